"""Stop requests: their origin, and the one that counts if there are several."""

from __future__ import annotations

import signal

import pytest

from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer.stops import StopRequests


@pytest.mark.parametrize(
    ("number", "has_file", "stop_after", "stopped_by", "may_be_killed_soon"),
    [
        (0, False, None, None, False),
        (0, False, 6, None, False),
        (0, False, 5, "stop_after", False),
        (0, False, 4, "stop_after", False),
        (signal.SIGTERM, False, None, "SIGTERM", True),
        (signal.SIGTERM, False, 5, "SIGTERM", True),
        (0, True, None, "request", True),
        (signal.SIGTERM, True, 5, "request", True),
    ],
)
def test_reasons_for_a_last_step(tmp_path, number, has_file, stop_after, stopped_by, may_be_killed_soon):
    run = RunDirectory(tmp_path)
    if has_file:
        run.stop_file.write_text("now")
    stops = StopRequests(run, Topology(dp=1, tp=1, rank=0), stop_after, lambda: number)
    assert stops.agree(5) == (stopped_by is not None)
    assert (stops.stopped_by, stops.may_be_killed_soon()) == (stopped_by, may_be_killed_soon)


def test_before_the_first_step_only_the_slot_counts(tmp_path):
    stops = StopRequests(RunDirectory(tmp_path), Topology(dp=1, tp=1, rank=0), 3, lambda: signal.SIGTERM)
    assert not stops.time_slot_has_ended(2)
    assert stops.time_slot_has_ended(3)
    assert stops.stopped_by == "stop_after"
