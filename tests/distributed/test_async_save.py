"""Asynchronous saves: checkpoints written during training hold the states of the step in their name.

Failures during a save are tested in ``faults``.
"""

from __future__ import annotations

import pytest

from tests.distributed.cases import interruption
from tests.distributed.cases.interruption import END, STOP
from tests.distributed.observing.comparing import assert_identical, compare
from tutorial_lib import checkpoint


@pytest.mark.parametrize(
    ("ranks", "kind"), [(ranks, kind) for ranks, kinds in interruption.ASYNC_SAVED.items() for kind in kinds]
)
def test_a_run_resumed_from_an_async_save_continues_bit_for_bit(observed, ranks, kind):
    """The files are written only after the next step has changed the states."""
    run = observed(ranks, f"async_saved.{kind}")
    assert_identical(run, observed(ranks, f"uninterrupted.{kind}"))
    assert run.directory.result()["resumed_from"] == STOP - 1
    assert len(run.examples) == END - STOP + 1
    for path in run.directory.checkpoints.iterdir():
        checkpoint.verify(path)
    assert [saved["step"] for saved in run.directory.result()["saves"]] == [4, 6, 8]


def test_the_comparison_detects_a_save_without_a_snapshot(observed):
    run, reference = observed(2, "no_snapshot.zero1"), observed(2, "uninterrupted.zero1")
    differences = compare(run, reference, tolerance=0.0, moments=0.0)
    assert {"loss", "parameters", "exp_avg"} <= differences.found.keys(), differences.found
