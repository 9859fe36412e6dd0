"""Exercises of lesson 00: they accept the right answer and explain a wrong one."""

from __future__ import annotations

from tests.support.exercise_assertions import assert_explains
from tutorial_lib.config import Config
from tutorial_lib.lab import start


def test_the_right_answer_follows_the_configuration_and_wrong_ones_are_explained() -> None:
    right = Config.create("cpu", global_batch=64, dp=4, micro_batch=2).accumulation
    wrong = {32: "for one GPU", 16: "rows each GPU gets", 9: "too high"}
    assert_explains(start.accumulation(global_batch=64, dp=4, micro_batch=2), right, wrong)


def test_a_difference_at_the_first_step_is_a_mistake() -> None:
    assert_explains(start.rounding_or_mistake(apart=2e-7), "mistake", {"rounding": "what rounding does: 2e-07"})


def test_the_share_of_tokens_left_out_follows_the_run() -> None:
    exercise = start.tokens_left_out(tokens=1986, rows=16, row_length=128)
    wrong = {97.0: "did count", 0.03: "in percent", 62: "Which share", 9: "too high"}
    assert_explains(exercise, 100 * 62 / 2048, wrong)


def test_a_share_that_a_wrong_answer_would_hit_is_no_error() -> None:
    for tokens in (2048, 1024):
        exercise = start.tokens_left_out(tokens=tokens, rows=16, row_length=128)
        assert_explains(exercise, 100 * (1 - tokens / 2048), {75: "too high"})
