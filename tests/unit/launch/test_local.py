"""Errors name the rank that failed first, not the ranks that ended or were killed as a consequence."""

import signal

import pytest

from tutorial_lib.launch.local import Failure, first_failure, unrecorded_failure

KILLED, ABORTED, HUNG_UP, TERMINATED = -signal.SIGKILL, -signal.SIGABRT, -signal.SIGHUP, -signal.SIGTERM


LOST = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer"
TRACEBACK = """Traceback (most recent call last):
  File "rank.py", line 1, in main
{}
printed later, from a buffer"""


def record(rank, time, message=""):
    return {"rank": rank, "time": time, "message": message}


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


@pytest.mark.parametrize(
    ("written", "printed", "rank"),
    [
        ([], [f"RuntimeError: {LOST}", "OSError: no space"], 1),
        ([], ["ValueError: first", "ValueError: second"], 0),
        ([], [f"RuntimeError: {LOST}", "killed by the launcher", f"RuntimeError: {LOST}"], None),
        ([record(0, 1.0, LOST)], ["printed on the way", "OSError: no space"], 1),
        ([record(0, 1.0, "the cause")], ["printed on the way", "OSError: no space"], None),
    ],
)
def test_an_error_that_a_rank_could_only_print_comes_before_those_of_its_peers(written, printed, rank):
    failures = [
        Failure(number, 1, 10.0 + number) for number in range(len(printed)) if "launcher" not in printed[number]
    ]
    found = unrecorded_failure(failures, written, [TRACEBACK.format(line) for line in printed])
    assert (found and found.rank) == rank
