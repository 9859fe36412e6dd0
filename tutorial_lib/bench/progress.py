"""Progress of a matrix while it runs: the row, its step, its seconds, and an estimate for the rest."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, TextIO

from tutorial_lib.bench.record import RowRecord
from tutorial_lib.config import Config
from tutorial_lib.lab import display

_BEAT_SECONDS = 0.5


class MatrixProgress:
    """Shows a matrix's progress: a line that is rewritten in a terminal or a notebook, otherwise a line per row.

    Args:
        file: where to write outside notebooks; default: standard error.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._in_notebook = display.in_notebook()
        self._rewrites = self._in_notebook or self._file.isatty()
        self._rows: list[str] = []
        self._row = ""
        self._step = ""
        self._num_steps: int | None = None
        self._seconds: list[float] = []
        self._began: float | None = None
        self._ended = threading.Event()
        self._beats: threading.Thread | None = None
        self._handle: Any = None

    def plan(self, rows: Sequence[str]) -> None:
        """Receive the names of the rows that are left to run."""
        self._rows = list(rows)
        if self._rewrites:
            self._beats = threading.Thread(target=self._beat, name="matrix-progress", daemon=True)
            self._beats.start()

    def begin(self, row: str, config: Config) -> None:
        """Note that a row has started."""
        self._row, self._step, self._num_steps = row, "starting processes", config.run.steps
        self._began = time.monotonic()
        if not self._rewrites:
            self._print(self.line())

    def on_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Receive new rows of the run's metrics."""
        of_all = f" of {self._num_steps}" if self._num_steps else ""
        self._step = f"step {rows[-1]['step']}{of_all}"

    def end(self, record: RowRecord) -> None:
        """Note that the row has ended."""
        self._seconds.append(time.monotonic() - (self._began or 0))
        self._began = None
        speed = f", {record.samples_per_second:.3g} samples/s" if record.samples_per_second else ""
        why = f": {record.cause}" if record.cause else ""
        self._print(f"row {len(self._seconds)} of {len(self._rows)}, {record.name}: {record.status} after "
                    f"{self._seconds[-1]:.1f} s{speed}{why}{self._left()}")  # fmt: skip

    def close(self) -> None:
        """End the line. Safe to call twice."""
        self._ended.set()
        if self._beats:
            self._beats.join()
            self._beats = None
            self._rewrite(f"{len(self._seconds)} of {len(self._rows)} rows run" if self._in_notebook else "")

    def line(self) -> str:
        """Return the current row, its progress, and an estimate of the time left."""
        seconds = f", {time.monotonic() - self._began:.0f} s" if self._began else ""
        return f"row {len(self._seconds) + 1} of {len(self._rows)}, {self._row}: {self._step}{seconds}{self._left()}"

    def seconds_left(self) -> float | None:
        """Estimate the seconds left; return None before the first row has ended."""
        if not self._seconds:
            return None
        running = time.monotonic() - self._began if self._began else 0.0
        per_row = statistics.fmean(self._seconds[1:] or self._seconds)  # the first row also waits for imports
        waiting = len(self._rows) - len(self._seconds) - bool(self._began)
        return waiting * per_row + (max(0.0, per_row - running) if self._began else 0.0)

    def _left(self) -> str:
        left = self.seconds_left()
        return f"; about {_duration(left)} left" if left else ""

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            if self._began:
                self._rewrite(self.line())

    def _rewrite(self, line: str) -> None:
        if not self._in_notebook:
            self._file.write(f"\r\x1b[K{line}")
            self._file.flush()
            return
        from IPython.display import display as show

        data = {"text/plain": line}
        if self._handle is None:
            self._handle = show(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def _print(self, line: str) -> None:
        if self._in_notebook:
            self._rewrite(line)
        else:
            print(f"\r\x1b[K{line}" if self._rewrites else line, file=self._file, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
