"""Comparisons of a run that survived a fault with the uninterrupted run."""

from __future__ import annotations

from typing import Any

from tests.distributed.observing.comparing import Observed
from tutorial_lib import checkpoint
from tutorial_lib.checkpoint.directory import checkpoints
from tutorial_lib.records import RunDirectory

RECORD = ("step", "loss", "grad_norm", "tokens", "epoch", "lr")
"""Columns of ``metrics.jsonl`` that do not depend on time."""

SOON = 30
"""Seconds that may pass from a rank's end to the error. The timeout of a collective is 600."""


def assert_all_intact(run: RunDirectory) -> list[int]:
    """Verify each checkpoint of a run, and return their steps."""
    for path in checkpoints(run):
        checkpoint.verify(path)
    return [int(path.name.removeprefix("step-")) for path in checkpoints(run)]


def assert_same_records(run: RunDirectory, reference: RunDirectory) -> None:
    """Compare the rows of two runs, bit for bit."""
    for key in RECORD:
        assert [row[key] for row in run.rows()] == [row[key] for row in reference.rows()], key


def assert_same_states(run: RunDirectory, reference: RunDirectory) -> None:
    """Compare the weights and moments of two runs' last checkpoints, bit for bit."""
    found, expected = (checkpoint.open_full(checkpoint.latest(each)) for each in (run, reference))
    assert found.names == expected.names
    for name in expected.names:
        assert found.parameter(name).equal(expected.parameter(name)), name
    for name in expected.trained:
        for moment in checkpoint.MOMENTS:
            assert found.moment(name, moment).equal(expected.moment(name, moment)), (name, moment)


def assert_training_continued_during_the_save(left: RunDirectory) -> None:
    """Check that a launch ended during its second save, which ran in the background while more steps were trained."""
    partial, saved = sorted(path.name for path in left.checkpoints.iterdir())
    assert partial.startswith(".partial-step-00000004-") and saved == "step-00000002"
    assert left.rows()[-1]["step"] > 4


def assert_ends_like(signalled: dict[str, Any], uninterrupted: Observed) -> None:
    """Check that the last start of the ``signalled`` run completed it like an uninterrupted one."""
    code, said, result = signalled["ended"]
    assert (code, said, result["status"]) == (0, "", "completed")
    run = RunDirectory(signalled["config"].directory)
    assert_same_records(run, uninterrupted.directory)
    assert_same_states(run, uninterrupted.directory)
    assert_all_intact(run)
