"""Progress of a matrix while it runs: the current row, its step, its seconds, and an estimate of the time left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, TextIO

from tutorial_lib.bench.record import RowRecord
from tutorial_lib.lab.progress import StatusLine, duration
from tutorial_lib.tables import format_short


class SilentProgress:
    """Receives a matrix's progress, and shows nothing."""

    def plan(self, rows: Sequence[str]) -> None:
        """Receive the names of the rows that are left to run."""

    def begin(self, row: str, num_steps: int | None) -> None:
        """Note that a row has started."""

    def on_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Receive new rows of ``metrics.jsonl`` from the current row's run."""

    def end(self, record: RowRecord) -> None:
        """Note that the row has ended."""

    def close(self) -> None:
        """Note that no more rows follow. Safe to call twice."""


class MatrixProgress(SilentProgress):
    """Shows a matrix's progress.

    In a terminal or a notebook, one line is rewritten while a row runs. In a log, each row gets two lines: one when it
    starts, and one when it has ended.

    Args:
        file: where to write outside notebooks; default: standard error.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._line = StatusLine(file)
        self._rows: list[str] = []
        self._row = ""
        self._step = ""
        self._num_steps: int | None = None
        self._seconds: list[float] = []
        self._began: float | None = None

    def plan(self, rows: Sequence[str]) -> None:
        self._rows = list(rows)
        self._line.refresh_with(self._refresh)

    def begin(self, row: str, num_steps: int | None) -> None:
        self._row, self._step, self._num_steps = row, "starting processes", num_steps
        self._began = time.monotonic()
        if not self._line.is_live:
            self._line.show(self.line())

    def on_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        of_all = f" of {self._num_steps}" if self._num_steps else ""
        self._step = f"step {rows[-1]['step']}{of_all}"

    def end(self, record: RowRecord) -> None:
        self._seconds.append(time.monotonic() - (self._began or 0))
        self._began = None
        speed = f", {format_short(record.samples_per_second)} samples/s" if record.samples_per_second else ""
        why = f": {record.cause}" if record.cause else ""
        self._line.keep(f"row {len(self._seconds)} of {len(self._rows)}, {record.name}: {record.status} after "
                        f"{self._seconds[-1]:.1f} s{speed}{why}{self._left()}")  # fmt: skip

    def close(self) -> None:
        if self._line.stop() and self._line.is_live:
            self._line.show(f"{len(self._seconds)} of {len(self._rows)} rows run" if self._line.in_notebook else "")

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
        return f"; about {duration(left)} left" if left else ""

    def _refresh(self) -> None:
        if self._began:
            self._line.show(self.line())
