"""Launch errors: the message of the rank that failed first, and where the same command would resume."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from tutorial_lib.config import ConfigError
from tutorial_lib.records import RunDirectory, lost_another_rank

OUTPUT_OF_A_RANK = "\nIts output: "
"""Text before the name of a failed rank's log."""

_RECORD_SECONDS = 3.0
"""Seconds for the other ranks to record why they failed. Network file systems show new files a little late."""


class WorkerError(RuntimeError):
    """A worker failed. The message holds the failing rank's own traceback, if it left one.

    Attributes:
        was_signalled: whether the launch had been asked to stop before.
    """

    was_signalled = False


def first_error(directories: Sequence[RunDirectory], otherwise: str) -> Exception:
    """Return the error of the rank that failed first, or an error with the text ``otherwise`` if no rank wrote one."""
    for directory in directories:
        record = directory.first_error()
        if record and record["type"] == ConfigError.__name__:
            return ConfigError(record["message"])
        if record:
            return WorkerError(
                f"Rank {record['rank']} of run {directory.path.name!r} failed with {record['type']}: "
                f"{record['message']}\n\n{record['traceback']}{OUTPUT_OF_A_RANK}{directory.log_file(record['rank'])}"
            )
    return WorkerError(otherwise)


def error_of_joined_rank(directory: RunDirectory, rank: int, num_ranks: int) -> WorkerError:
    """Return the error that one of torchrun's ranks ends with, which names the rank that failed first and its error.

    This rank has recorded its own error. If it only lost another rank, wait a moment for that rank's record.
    """
    until = time.monotonic() + _RECORD_SECONDS
    while True:
        records, first = directory.errors(), directory.first_error()
        assert first is not None
        if not lost_another_rank(first) or len(records) == num_ranks or time.monotonic() > until:
            break
        time.sleep(0.1)
    run = directory.path.name
    if lost_another_rank(first):
        own = next(record for record in records if record["rank"] == rank)
        return WorkerError(
            f"Rank {rank} of run {run!r} lost the connection to another rank, or got no answer. "
            f"{_silent_ranks(records, num_ranks)} {next_start([directory])}\n{own['type']}: {own['message']}"
        )
    what = f"{first['type']}: {first['message']}"
    if first["rank"] == rank:
        return WorkerError(f"Rank {rank} of run {run!r} failed with {what}\n\n{first['traceback']}")
    return WorkerError(
        f"Rank {rank} of run {run!r} ends because rank {first['rank']}, on {first['node']}, failed with {what}\n"
        "The output of that rank has the traceback."
    )


def _silent_ranks(records: Sequence[Mapping[str, Any]], num_ranks: int) -> str:
    """Name the ranks that left no error; if there are none, suspect the network."""
    silent = sorted(set(range(num_ranks)) - {record["rank"] for record in records})
    if not silent:
        return "So did all the others: the network between their nodes may have failed."
    why = "killed, perhaps for lack of memory, or its node was lost."
    if len(silent) == 1:
        return f"Rank {silent[0]} left no error: it was {why}"
    named = ", ".join(map(str, silent[:8])) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
    return f"Ranks {named} left no error: at least one of them was {why}"


def next_start(directories: Sequence[RunDirectory]) -> str:
    """Describe where the same runs would resume if they were started again."""
    from tutorial_lib.checkpoint import CheckpointError
    from tutorial_lib.checkpoint.directory import next_start_from

    try:
        found = {directory.path.name: next_start_from(directory) for directory in directories}
    except CheckpointError as error:
        return str(error)
    where = ", ".join(f"{name!r} from {start or 'step 0'}" for name, start in found.items())
    return f"Run the same command again, and it resumes: {where}."
