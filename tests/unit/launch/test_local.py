"""Errors name the rank that failed first, not the ranks that ended or were killed as a consequence."""

import signal

import pytest

from tutorial_lib.launch.local import Failure, first_failure

KILLED, ABORTED, HUNG_UP, TERMINATED = -signal.SIGKILL, -signal.SIGABRT, -signal.SIGHUP, -signal.SIGTERM


def record(rank, time):
    return {"rank": rank, "time": time}


@pytest.mark.parametrize(
    ("failures", "written", "rank"),
    [
        ([Failure(0, 1, 10.0), Failure(1, KILLED, 20.0, True)], [record(0, 9.9)], 0),
        ([Failure(0, 1, 10.0), Failure(1, KILLED, 20.0, True)], [], 0),
        ([Failure(0, 1, 10.0), Failure(1, ABORTED, 13.0)], [record(0, 9.9)], 0),
        ([Failure(0, 1, 10.0), Failure(1, KILLED, 10.2)], [record(0, 9.9)], 1),
        ([Failure(0, 1, 10.0), Failure(1, HUNG_UP, 10.2)], [record(0, 9.9)], 1),
        ([Failure(0, 1, 10.0), Failure(1, TERMINATED, 10.2)], [record(0, 9.9)], 0),
        ([Failure(1, KILLED, 10.0), Failure(0, 1, 10.1)], [record(0, 10.05)], 1),
        ([Failure(1, 1, 10.0), Failure(0, 1, 10.1)], [], 1),
        ([Failure(1, KILLED, 20.0, True)], [], 1),
    ],
)
def test_the_failure_that_caused_the_others(failures, written, rank):
    assert first_failure(failures, written).rank == rank
