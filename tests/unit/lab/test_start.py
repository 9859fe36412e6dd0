"""Exercise of lesson 00: it accepts the right answer and explains a wrong one."""

from __future__ import annotations

from tests.support.exercise_assertions import assert_explains
from tutorial_lib.config import Config
from tutorial_lib.lab import start


def test_the_right_answer_follows_the_configuration_and_wrong_ones_are_explained() -> None:
    right = Config.create("cpu", global_batch=64, dp=4, micro_batch=2).accumulation
    wrong = {32: "for one GPU", 16: "rows each GPU gets", 9: "too high"}
    assert_explains(start.accumulation(global_batch=64, dp=4, micro_batch=2), right, wrong)
