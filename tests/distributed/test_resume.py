"""Resume: a run that is stopped within an epoch and started again equals the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import re

import pytest

from tests.distributed.cases import interruption
from tests.distributed.cases.interruption import END, STOP
from tests.distributed.observing.comparing import assert_identical, compare
from tests.distributed.observing.probe import ERRORS
from tutorial_lib.records import RunDirectory


@pytest.mark.parametrize("name", interruption.INTERRUPTED)
def test_a_resumed_run_continues_bit_for_bit(observed, resumed, name):
    assert_continues(resumed(f"interrupted.{name}"), observed(2, f"uninterrupted.{name}"))


@pytest.mark.parametrize("name", interruption.INTERRUPTED_ON_4)
def test_a_run_resumed_on_four_ranks_continues_bit_for_bit(observed, name):
    assert_continues(observed(4, f"restarted.{name}"), observed(4, f"uninterrupted.{name}"))


def assert_continues(run, uninterrupted):
    assert_identical(run, uninterrupted)
    assert [row["step"] for row in run.rows] == list(range(1, END + 1))
    assert len(run.examples) == END - STOP
    assert [row["epoch"] for row in run.rows] == [0] * 5 + [1] * 3, "it stops within one epoch, and ends within another"
    result = RunDirectory(run.config.directory).result()
    assert (result["status"], result["resumed_from"]) == ("completed", STOP)


@pytest.mark.parametrize("name", interruption.INTERRUPTED)
def test_an_engine_that_finds_nothing_to_load_says_so(observed, name):
    """DeepSpeed itself returns ``(None, None)``, and training would start again from the base weights."""
    said = observed(2, f"uninterrupted.{name}").load_of_nothing
    assert "found nothing to load in" in said and "not resumed" in said


def test_rows_after_the_checkpoint_are_written_again(resumed):
    """``interruption.resumed_runs`` added rows of steps 4 and 5 to the file, and half a row."""
    run = resumed("interrupted.zero1")
    assert [row["step"] for row in run.rows] == list(range(1, END + 1))
    assert all(row["loss"] < 99 for row in run.rows)
    assert run.config.directory.joinpath("metrics.jsonl").read_text().endswith("}\n")


def test_a_refused_start_leaves_the_run_as_it_was(resumed, directory):
    run = RunDirectory(directory / "runs" / "altered.shard")
    assert [row["step"] for row in run.rows()] == list(range(1, STOP + 1))
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{STOP:08d}"]


def test_dropout_is_active(observed):
    """Check that random states matter to these runs."""
    with_dropout, without = observed(2, "uninterrupted.zero1"), observed(1, "uninterrupted-torch.gpt2")
    assert with_dropout.config.run.seed == without.config.run.seed
    assert with_dropout.examples == without.examples
    assert abs(with_dropout.rows[0]["loss"] - without.rows[0]["loss"]) > 1e-4


@pytest.mark.parametrize(
    ("fault", "shown_by"),
    [
        ("restore.random_states_not_restored", {"loss", "grad_norm", "parameters"}),
        ("restore.position_not_restored", {"examples", "tokens", "loss", "parameters"}),
        ("restore.optimizer_not_restored", {"loss", "parameters", "exp_avg", "exp_avg_sq"}),
    ],
)
def test_the_comparison_detects_an_incomplete_resume(observed, resumed, fault, shown_by):
    run, reference = resumed(fault), observed(2, f"uninterrupted.{interruption.RESUME_FAULTS[fault]}")
    differences = compare(run, reference, tolerance=0.0, moments=0.0)
    assert shown_by <= differences.found.keys(), differences.found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("altered.position", r"rank-001\.pt was altered"),
        ("altered.shard", r"zero_pp_rank_1_\S+optim_states\.pt was altered"),
        ("altered.metadata", r"engine/\.metadata was altered"),
    ],
)
def test_an_error_found_by_one_rank_is_raised_on_all(resumed, directory, name, message):
    errors = json.loads((directory / "runs" / name / ERRORS).read_text())
    assert len(errors) == 2
    for error in errors:
        assert error["type"] == "CheckpointError"
        assert re.search(message, error["message"]), error["message"]
        assert "none of them is intact" in error["message"]


def test_a_run_that_diverges_stops_on_every_rank_and_names_the_newest_checkpoint(resumed, directory):
    """The first update throws the weights out of range, which the loss of the second step shows."""
    run = RunDirectory(directory / "runs" / "diverging")
    errors = json.loads((run.path / ERRORS).read_text())
    assert len(errors) == 2
    for error in errors:
        assert error["type"] == "NonFiniteLoss"
        assert error["message"].startswith("At step 2 the loss is")
        assert f"The newest checkpoint is {run.checkpoints / 'step-00000001'}." in error["message"]
    assert [row["step"] for row in run.rows()] == [1]
