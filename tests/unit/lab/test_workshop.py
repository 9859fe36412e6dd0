"""Exercises of the ZeRO workshop: each accepts the right answer and explains a wrong one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.unit.lab.exercise_assertions import assert_explains
from tutorial_lib.lab import workshop

ROWS = [SimpleNamespace(name=f"stage-{stage}", states_bytes=(4 - stage) * workshop.MIB) for stage in range(4)]
EXERCISES = {
    "stop": (workshop.when_to_stop([4.6, 4.7, 4.8]), 1, {"3": "4.800"}),
    "batch": (workshop.batch_on_more_gpus(4, 4, 8), 128, {16: "one GPU", 32: "one forward pass", 100: "too low"}),
    "fewest": (workshop.fewest_bytes(ROWS), "stage-3", {"stage-1": "3.00 MiB", "stage-9": "not one of the answers"}),
    "share": (workshop.optimizer_share(1024 * 1024, 4), 3.0, {2.0: "two moments", 12.0: "all ranks", 4.0: "too high"}),
    "price": (workshop.price_of_offload(-12.3), -12.3, {12.3: "the sign", 40.0: "too high"}),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_is_accepted_and_wrong_ones_are_explained(name: str) -> None:
    assert_explains(*EXERCISES[name])
