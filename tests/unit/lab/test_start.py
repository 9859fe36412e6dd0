"""Exercise of the first page: it accepts the right answer and explains a wrong one."""

from __future__ import annotations

import pytest

from tutorial_lib.config import Config
from tutorial_lib.lab import start


def test_the_right_answer_is_accepted() -> None:
    exercise = start.accumulation(global_batch=64, dp=4, micro_batch=2)
    assert exercise.check(Config.create("cpu", global_batch=64, dp=4, micro_batch=2).accumulation).right is True
    assert exercise.check().right is None


@pytest.mark.parametrize(("answer", "reason"), [(32, "for one GPU"), (16, "rows each GPU gets"), (9, "too high")])
def test_a_wrong_answer_is_explained(answer: int, reason: str) -> None:
    feedback = start.accumulation(global_batch=64, dp=4, micro_batch=2).check(answer)
    assert feedback.right is False and reason in feedback.reason
