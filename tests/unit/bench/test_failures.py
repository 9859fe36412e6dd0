"""Failures of a row: out of memory, killed, refused, or another error."""

from __future__ import annotations

import pytest

from tutorial_lib.bench.failures import explain
from tutorial_lib.config import ConfigError
from tutorial_lib.launch import WorkerError

KILLED = "Rank 1 ended with exit code -9 and left no traceback: it was killed, perhaps for lack of memory. The end:\nx"
CUDA = "Rank 0 of run 'a' failed with OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.\n\ntrace"
HOST = (
    "Rank 0 of run 'a' failed with RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.mark.parametrize(
    ("error", "oom_kills", "status"),
    [
        (WorkerError(KILLED), 0, "killed"),
        (WorkerError(KILLED), 1, "out of memory"),
        (WorkerError(CUDA), 0, "out of memory"),
        (WorkerError(HOST), 0, "out of memory"),
        (WorkerError("Rank 0 of run 'a' failed with NonFiniteLoss: At step 3 the loss is nan."), 0, "failed"),
        (WorkerError("Rank 0 of run 'a' failed with ValueError: x"), 1, "failed"),
        (ConfigError("This run needs 40.0 GB of memory"), 0, "refused"),
    ],
)
def test_kinds_of_failures(error, oom_kills, status):
    found, cause = explain(error, oom_kills)
    assert found == status and "\n" not in cause and cause.startswith(str(error).splitlines()[0])


def test_an_error_without_a_message_shows_its_type():
    assert explain(AssertionError(), 0) == ("failed", "AssertionError")
