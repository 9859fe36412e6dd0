"""A real benchmark matrix: its memory matches the formulas, and it survives failing rows and an interrupt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.launching import interrupt_when
from tutorial_lib import bench, launch
from tutorial_lib.bench import Matrix
from tutorial_lib.cli import main
from tutorial_lib.config import Config, ConfigError

ROWS = ("baseline", "stage-1", "stage-2", "stage-3")
FAILING = {1: "tests.distributed.workers.killed", 2: "tests.distributed.workers.out_of_memory"}
"""Workers of the rows that fail, by stage of ZeRO."""

COMMON = {"steps": 4, "seq_length": 32, "max_examples": 32, "max_eval_examples": 8, "global_batch": 4, "micro_batch": 1}


def config(storage: Path, name: str, **flat) -> Config:
    return Config.create("cpu", name=name, storage=str(storage), **(COMMON | flat))


def run(row: Config, *, on_rows=None) -> launch.Run:
    """Run a row. The last rank is killed in stage 1, and runs out of memory in stage 2."""
    stage = row.engine.zero_stage if row.engine.name == "deepspeed" else 0
    return launch.run_all([row], on_rows=on_rows, worker=FAILING.get(stage))[0]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> Matrix:
    """Run the matrix of ZeRO stages, of which two fail."""
    storage = tmp_path_factory.mktemp("bench")
    return bench.run_matrix("zero-stages", config(storage, "stages", dp=2), rows=ROWS, run=run, sample_interval=0.1)


def assert_as_predicted(row: bench.RowRecord) -> None:
    """Compare every part of every rank's model states with the formula, to 2 %, and the peak of a step, to 10 %.

    The peak may include one more copy of the gradients or of gathered weights, depending on timing.
    """
    assert row.is_done, row.error
    assert len(row.states) == len(row.predicted_states) == row.world_size
    for measured, predicted in zip(row.states, row.predicted_states, strict=True):
        assert measured.to_dict() == pytest.approx(predicted.to_dict(), rel=0.02), row.name
    copy = 4 * row.num_parameters
    assert 0.9 * row.predicted_peak_bytes <= row.peak_bytes <= 1.1 * row.predicted_peak_bytes + copy, row.name


def test_a_killed_rank_and_one_out_of_memory_are_reported_and_the_next_row_runs(matrix):
    assert [row.status for row in matrix.rows] == ["done", "killed", "out of memory", "done"]
    assert "can't allocate memory" in matrix["stage-2"].cause
    assert "Rank 1 ended with exit code -9" in matrix["stage-1"].cause
    with pytest.raises(ConfigError, match="'stage-1' is not done: killed"):
        bench.compare(matrix.path / "stage-3", matrix.path / "stage-1")


def test_model_states_match_the_formulas(matrix):
    for row in matrix.rows:
        if row.is_done:
            assert_as_predicted(row)


def test_rows_take_the_same_steps(matrix):
    losses = [row.train_loss for row in matrix.rows if row.is_done]
    assert losses == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_memory_and_speed_are_measured(matrix):
    for row in matrix.rows:
        if row.is_done:
            assert row.process_tree.counted == "PSS" and row.process_tree.peak > 300 * 2**20
            assert row.process_tree.num_samples >= 5
            assert 0 < row.step_seconds < row.train_seconds < row.wall_seconds
            assert row.steps_per_epoch == 8 and len(row.eval_losses) == 1
            ranks = matrix.run_directory(row.name).result()["ranks"]
            assert {(rank["device"], rank["ranks_on_node"]) for rank in ranks} == {("cpu", row.world_size)}
            assert row.predicted_step_seconds is None  # there is no preset for a CPU


def test_an_interrupted_retry_keeps_all_other_rows_and_can_be_continued(matrix, capsys):
    kept = {row.name: row for row in matrix.rows}
    retried = matrix.run_directory("stage-1")
    shutil.rmtree(retried.path)  # as the retry would
    flags = [word for flag, value in COMMON.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    striker = interrupt_when(retried.logs.exists)  # the launch creates them once it handles signals
    code = main(["bench", "zero-stages", "--name", "stages", "--storage", str(matrix.path.parent), "--dp", "2",
                 "--rows", "stage-1", "--retry", *flags])  # fmt: skip
    striker.join()
    assert code == 75 and "Run the same command again to continue" in capsys.readouterr().err
    assert Matrix.read(matrix.path)["stage-1"].status == "stopped"
    asked = config(matrix.path.parent, "stages", dp=2)
    again = bench.run_matrix("zero-stages", asked, rows=ROWS, sample_interval=0.1)
    assert_as_predicted(again["stage-1"])
    assert [row for row in again.rows if row.name != "stage-1"] == [kept[n] for n in kept if n != "stage-1"]


def test_offloaded_16_bit_states_match_the_formulas(tmp_path):
    asked = config(tmp_path, "off", dp=2, precision="bf16")
    (row,) = bench.run_matrix("offload", asked, rows=("2ZO-2G1N",)).rows
    assert_as_predicted(row)
    assert row.world_size == 2 and row.settings["offload"] == "optimizer"
