"""Check of an exercise, for the tests of each lesson's exercises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutorial_lib.lab.exercises import Exercise


def assert_explains(exercise: Exercise, right: Any, wrong: Mapping[Any, str]) -> None:
    """Assert that an exercise accepts the right answer, leaves a missing one open, and explains each wrong one.

    Args:
        exercise: the exercise.
        right: its right answer.
        wrong: wrong answers, with words from the explanation of each.
    """
    assert exercise.check(right).right is True
    assert exercise.check().right is None
    for answer, reason in wrong.items():
        feedback = exercise.check(answer)
        assert feedback.right is False and reason.casefold() in feedback.reason.casefold(), feedback
