"""Lesson 06's exercises, its recording, and the paths that it hides."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.exercise_assertions import assert_explains
from tutorial_lib.lab import scaling

TASKS = [{"RANK": None, "LOCAL_RANK": None, "WORLD_SIZE": None, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}]
EXERCISES = {
    "speed-up": (scaling.strong_speed_up(2, {1: 100.0, 2: 150.0}), 1.5, {0.75: "efficiency", 1: "too low"}),
    "constant": (
        scaling.what_stays_constant(),
        "seconds per step",
        {"samples/s": "all processes together", "global batch": "learning rate"},
    ),
    "memory": (
        scaling.memory_of_nodes([700 * 2**20, 650 * 2**20]),
        "libraries",
        {"activations": "16 rows", "gradients": "2.6 MiB"},
    ),
    "tokens": (scaling.break_even_tokens(4e14, 5e10), 5333, {2667: "twice", 100: "too low"}),
    "local rank": (
        scaling.who_sets_local_rank(TASKS),
        "SLURM_LOCALID",
        {"LOCAL_RANK": "RANK, LOCAL_RANK, WORLD_SIZE are missing", "SLURM_PROCID": "across all nodes"},
    ),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_is_accepted_and_wrong_ones_are_explained(name: str) -> None:
    assert_explains(*EXERCISES[name])


def test_the_recording_says_when_and_with_what_it_was_made() -> None:
    recorded = scaling.recording()
    assert {"date", "SLURM", "PyTorch", "Python", "machine"} <= recorded["made"].keys()
    assert [task["SLURM_PROCID"] for task in recorded["srun"]] == ["0", "1", "2", "3"]
    assert [each["found"]["RANK"] for each in recorded["torchrun"]] == ["0", "1", "2", "3"]
    assert [row["nodes"] for row in recorded["nodes"]] == [1, 2, 4, 8]
    assert recorded["preempted"]["losses"] == recorded["undisturbed"], "bit for bit"


def test_efficiency_of_nodes_is_compared_with_what_two_cores_allow() -> None:
    memory = {"memory_peak": 3 * 2**20, "memory_mean": 2.5 * 2**20, "memory_modes": [2**20, 2**21, 3 * 2**20]}
    measured = {1: 100.0, 4: 160.0}
    rows = scaling.table_by_nodes(
        [
            {"nodes": n, "samples_per_second": speed, "step_seconds": 0.16, "train_loss": 3.5, **memory}
            for n, speed in measured.items()
        ]
    )
    shown = ("efficiency (%)", "two cores allow (%)", "average (MiB)", "mode (MiB)")
    assert [[row[name] for name in shown] for row in rows] == [[100, 100, 2, [1, 2]], [40, 50, 2, [1, 2]]]


def test_paths_of_this_machine_are_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"PATH={Path(sys.executable).parent}:$PATH run={tmp_path}/runs"
    assert scaling.hide_paths(text) == "PATH=/shared/course/bin:$PATH run=/shared/run/runs"
