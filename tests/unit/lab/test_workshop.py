"""Exercises of the ZeRO workshop: each accepts the right answer and explains a wrong one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support.exercise_assertions import assert_explains
from tutorial_lib.lab import workshop
from tutorial_lib.theory.memory import ModelStates


def row(
    name: str = "", states_mib: float = 0, speed: float = 0, gpu_mib: float = 0, step_mib: float = 35
) -> SimpleNamespace:
    """Return a row whose states are one quarter parameters, one quarter gradients, and one half optimizer states."""
    held = states_mib * workshop.MIB
    return SimpleNamespace(
        name=name, states_bytes=held, peak_bytes=step_mib * workshop.MIB, samples_per_second=speed,
        gpu=SimpleNamespace(peak=gpu_mib * workshop.MIB), states=(ModelStates(held // 4, held // 4, held // 2),),
    )  # fmt: skip


PAGEABLE = row("2ZO-1G1N", speed=10, gpu_mib=1000)
EXERCISES = {
    "stop": (workshop.when_to_stop([4.6, 4.7, 4.8]), 1, {"3": "4.800"}),
    "batch": (workshop.batch_on_more_gpus(4, 4, 8), 128, {16: "one GPU", 32: "one forward pass", 100: "too low"}),
    "falls": (
        workshop.peak_as_processes_are_added(row(states_mib=12), row(states_mib=7)), "falls",
        {"stays": "plain data parallelism", "rises": "the same size", "no": "not one of the answers"},
    ),
    "stays": (
        workshop.peak_as_processes_are_added(row(states_mib=12), row(states_mib=12)), "stays",
        {"falls": "12.00 MiB on one process"},
    ),
    "pinned, no GPU": (
        workshop.what_pinning_changed([PAGEABLE]), "not measured",
        {"speed": "which two rows", "memory": "which two rows", "nothing": "which two rows"},
    ),
    "pinned, faster": (
        workshop.what_pinning_changed([PAGEABLE, row("2ZOP-1G1N", speed=12, gpu_mib=1010)]), "speed",
        {"memory": "speed +20.0 %, memory +1.0 %", "not measured": "your rows say"},
    ),
    "pinned, no difference": (
        workshop.what_pinning_changed([PAGEABLE, row("2ZOP-1G1N", speed=9.9, gpu_mib=1000)]), "nothing",
        {"speed": "speed -1.0 %"},
    ),
    "share": (workshop.optimizer_share(1024 * 1024, 4), 3.0, {2.0: "two moments", 12.0: "all ranks", 4.0: "too high"}),
    "peak": (
        workshop.saving_of_the_peak([row(states_mib=12, step_mib=26), row(states_mib=8, step_mib=26)]), 8.6,
        {33.3: "the model states alone", 20: "too high"},
    ),
    "peak, without activations": (
        workshop.saving_of_the_peak([row(states_mib=12, step_mib=3), row(states_mib=8, step_mib=2)]), 33.3,
        {20: "too low"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_is_accepted_and_wrong_ones_are_explained(name: str) -> None:
    assert_explains(*EXERCISES[name])
