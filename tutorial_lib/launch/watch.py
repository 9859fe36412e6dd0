"""Watcher of a launch: reports new metrics rows, handles stop signals, and waits for the end."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tutorial_lib.records import STOPPING_MESSAGE, Row, RunDirectory

OnRows = Callable[[list[Row]], None]
"""Function called in the launching process with the metrics rows since the last call."""

POLL_SECONDS = 0.2

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask a launch to save and stop."""


class Watcher:
    """Passes new rows of the metrics files to the caller, and tells the user that an interrupt was noticed."""

    def __init__(
        self,
        directories: list[RunDirectory],
        on_rows: OnRows | None,
        signals: list[int],
        stopping_message: str = STOPPING_MESSAGE,
    ) -> None:
        self.directories = directories
        self.on_rows = on_rows
        self.signals = signals
        self.stopping_message = stopping_message
        self._has_announced = False
        self._seen = {directory.path: self._last_step(directory) for directory in directories}
        # Rows that are there already belong to an earlier start: this one deletes those that it writes again.
        self._versions = {directory.path: directory.metrics_version() for directory in directories}

    def poll(self) -> None:
        if signal.SIGINT in self.signals and not self._has_announced:
            self._has_announced = True
            print(self.stopping_message, file=sys.stderr, flush=True)
        if self.on_rows is None:
            return
        for directory in self.directories:
            version = directory.metrics_version()
            if self._versions[directory.path] == version:
                continue  # unchanged: do not read a long run's file five times a second
            self._versions[directory.path] = version
            new = [row for row in directory.rows() if row["step"] > self._seen[directory.path]]
            if new:
                self._seen[directory.path] = new[-1]["step"]
                self.on_rows(new)

    @staticmethod
    def _last_step(directory: RunDirectory) -> int:
        from tutorial_lib.checkpoint import latest

        # Rows after the newest checkpoint will be written again; those before it are old.
        found = latest(directory) if directory.checkpoints.is_dir() else None
        return int(found.name.removeprefix("step-")) if found else 0


@contextmanager
def stop_on_signal(watched: Watcher) -> Iterator[None]:
    """Turn signals into a stop request for the workers: they save at the next step, and the launch ends normally."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request_stop(number: int, _frame: Any) -> None:
        watched.signals.append(number)
        for directory in watched.directories:
            directory.logs.parent.mkdir(parents=True, exist_ok=True)
            directory.stop_file.write_text(f"signal {number} at {time.time()}\n")
        # A second signal stops the launch at once.
        signal.signal(number, before[signal.Signals(number)])

    # Ignored signals stay ignored, such as SIGINT for a shell's background jobs.
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    try:
        for number in before:  # within the try, because a signal may come as soon as the first handler is installed
            signal.signal(number, request_stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for directory in watched.directories:
            directory.stop_file.unlink(missing_ok=True)


def wait_for(thread: threading.Thread, *calls: Callable[[], None]) -> None:
    """Call each of ``calls`` every 0.2 s until the thread ends or a call raises."""
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        for call in calls:
            call()
