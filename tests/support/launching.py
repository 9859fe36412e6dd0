"""Launches for the tests: commands in a shell, and signals to this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tutorial_lib.records import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
NEEDS_WARM_SERVER = pytest.mark.skipif(
    os.environ.get("TUTORIAL_LIB_WARM_WORKERS") == "0", reason="tests the warm server, which is switched off"
)


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing happened within {seconds} s"
        time.sleep(0.02)


def interrupt_when(
    condition: Callable[[], object], times: int = 1, number: signal.Signals = signal.SIGINT
) -> threading.Thread:
    """Once a condition holds, send this process a signal, as Ctrl-C does, ``times`` times.

    The condition must not hold before the signal is handled, or the signal ends pytest. Each further signal waits until
    the one before has replaced the handler, because two signals that come at once count as one.
    """

    def strike() -> None:
        wait_until(condition, 60)
        handler = None
        for _ in range(times):
            wait_until(lambda before=handler: signal.getsignal(number) is not before)
            handler = signal.getsignal(number)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=strike)
    thread.start()
    return thread


class Shell:
    """Launcher of ``python -m ...`` in a separate process group, as from a shell, with its output in files."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, given: Sequence[str]) -> None:
        with (self.scratch / "stdout").open("wb") as out, (self.scratch / "stderr").open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *given],
                stdout=out,
                stderr=err,
                cwd=ROOT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def wait_for_step(self, run: RunDirectory, step: int) -> None:
        assert self.process is not None
        while not any(row["step"] >= step for row in run.rows()):
            assert self.process.poll() is None, (self.scratch / "stderr").read_text()
            time.sleep(0.02)

    def exit_code(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=240)

    def result(self) -> dict[str, object]:
        return dict(json.loads((self.scratch / "stdout").read_text()))

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
