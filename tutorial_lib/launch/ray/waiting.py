"""Checks while a fit waits for its first worker: a time limit, and stop requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tutorial_lib.launch.errors import WorkerError
from tutorial_lib.records import RunDirectory

START_TIMEOUT = 600
"""Seconds for Ray to start the first worker if there is room. On a busy laptop it takes a minute or two."""


class StoppedBeforeStart(Exception):
    """The runs were asked to stop before the first worker had started."""


def watch_for_start(directories: Sequence[RunDirectory]) -> Callable[[], bool]:
    """Return a check of whether a worker has started since this call, judging by writes to the logs."""

    def last_written() -> dict[Path, int]:
        logs = (log for directory in directories for log in directory.logs.glob("rank-*.log"))
        return {log: log.stat().st_mtime_ns for log in logs}

    before = last_written()
    return lambda: last_written() != before


def limit_wait(has_begun: Callable[[], bool], resource_timeout: float = 0) -> Callable[[], None]:
    """Return a check that raises if no worker has started in :data:`START_TIMEOUT` + ``resource_timeout`` seconds."""
    since = time.monotonic()

    def check() -> None:
        seconds = START_TIMEOUT + resource_timeout
        if time.monotonic() - since >= seconds and not has_begun():
            raise WorkerError(
                f"Ray started no worker within {seconds:.0f} s. `ray status` shows what it is waiting for; its own "
                "logs are under session_latest/logs in its temporary directory."
            )

    return check


def stop_before_start(has_begun: Callable[[], bool], directories: Sequence[RunDirectory]) -> Callable[[], None]:
    """Return a check that raises if the runs are asked to stop before there is a worker to notice it."""

    def check() -> None:
        if any(directory.stop_file.exists() for directory in directories) and not has_begun():
            raise StoppedBeforeStart

    return check
