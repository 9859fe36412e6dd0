"""Launch errors: the message of the rank that failed first, and what running the same command again would do."""

from __future__ import annotations

from collections.abc import Sequence

from tutorial_lib.config import ConfigError
from tutorial_lib.records import RunDirectory

OUTPUT_OF_A_RANK = "\nIts output: "
"""Text before the name of a failed rank's log."""


class WorkerError(RuntimeError):
    """A worker failed. The message holds the failing rank's own traceback."""


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
