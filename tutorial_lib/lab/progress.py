"""Progress of a run: a curve or a line in a notebook, a line in a terminal, occasional lines in a log.

It receives new rows of ``metrics.jsonl`` from the process that started the run:

>>> with progress(total_steps=60) as shown:
...     run(config, on_rows=shown.on_rows)
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from tutorial_lib.lab import display, figures

Row = Mapping[str, Any]


class StatusLine:
    """A status line, replaced in place in a notebook or terminal; in a log, each update is a new line.

    Args:
        file: where to write outside notebooks; default: standard error.
    """

    BEAT_SECONDS = 0.5

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self.in_notebook = file is None and display.in_notebook()
        self.is_live = self.in_notebook or self._file.isatty()
        self._display_id: str | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def show(self, text: str) -> None:
        """Replace the line, cut to a terminal's width; in a log, write a new one."""
        if self.in_notebook:
            self.show_bundle({"text/plain": text})
        elif self.is_live:
            width = shutil.get_terminal_size().columns - 1  # only the last line of wrapped text could be replaced
            print(f"\r\x1b[K{text[:width]}", end="", file=self._file, flush=True)
        else:
            print(text, file=self._file, flush=True)

    def keep(self, text: str) -> None:
        """Replace the line and, in a terminal, let later output start below it."""
        if self.is_live and not self.in_notebook:
            print(f"\r\x1b[K{text}", file=self._file, flush=True)
        else:
            self.show(text)

    def show_bundle(self, data: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Replace the notebook's output with a MIME bundle."""
        from IPython.display import display, update_display

        shown: dict[str, Any] = {"metadata": dict(metadata or {}), "raw": True}
        if self._display_id is None:
            self._display_id = display(dict(data), display_id=True, **shown).display_id
        else:
            update_display(dict(data), display_id=self._display_id, **shown)

    def refresh_with(self, refresh: Callable[[], None]) -> None:
        """Call a function twice a second until :meth:`stop`, unless this is a log."""

        def beat() -> None:
            while not self._ended.wait(self.BEAT_SECONDS):
                refresh()

        if self.is_live:
            self._thread = threading.Thread(target=beat, name="progress", daemon=True)
            self._thread.start()

    def stop(self) -> bool:
        """Stop refreshing the line; return False if it had been stopped before."""
        if self._ended.is_set():
            return False
        self._ended.set()
        if self._thread:
            self._thread.join()
        return True


class Progress:
    """The current step of one or more runs; as a context manager, it says at once that a run is starting.

    Several runs may follow one another: when the step number goes back, the next run has started. Where the line can be
    replaced, a thread refreshes it twice a second, so that a waiting reader sees the seconds go by.

    Args:
        total_steps: optimizer steps of each run, or None if only its epochs are known.
        title: name of the activity.
        labels: names of the runs, in order, if there are several.
        interval: minimum number of seconds between lines of a log. The last step is always reported.
        file: where to write outside notebooks; default: standard error.
    """

    def __init__(
        self,
        total_steps: int | None,
        *,
        title: str = "training",
        labels: Sequence[str] = (),
        interval: float = 10.0,
        file: TextIO | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.title = title
        self.labels = labels
        self.interval = interval
        self.runs: list[list[Row]] = []
        self.line = StatusLine(file)
        self._lock = threading.Lock()
        self._last_news = self._last_shown = time.monotonic()
        self._shown: Row | None = None

    def __enter__(self) -> Progress:
        self._last_news = time.monotonic()
        self.line.show(f"{self.title}: starting processes ...")
        self.line.refresh_with(self._refresh)
        return self

    def on_rows(self, rows: Sequence[Row]) -> None:
        """Receive the new rows since the last call. Each has a step and a loss; tokens and seconds are optional."""
        with self._lock:
            for row in rows:
                if not self.runs or row["step"] <= self.runs[-1][-1]["step"]:
                    self.runs.append([])
                self.runs[-1].append(row)
            if rows:
                self._last_news = time.monotonic()
                self._update()

    def close(self) -> None:
        """Show the final state; calling this twice is safe."""
        if self.line.stop() and self.runs:
            self._show_end()

    def __exit__(self, *error: object) -> None:
        self.close()
        if not self.runs and self.line.is_live:
            failed = error[0].__name__ if isinstance(error[0], type) else None
            self.line.keep(f"{self.title}: {f'no step, {failed}' if failed else 'no step was left to train'}")

    def _update(self) -> None:
        """Show new rows."""
        if self.line.is_live or time.monotonic() - self._last_shown >= self.interval:
            self._show(self._state())

    def _refresh(self) -> None:
        """Show how long it has been since the last row."""
        with self._lock:
            waited = time.monotonic() - self._last_news
            if not self.runs:
                self.line.show(f"{self.title}: starting processes ... {waited:.0f} s")
            else:
                self._refresh_run(waited)

    def _refresh_run(self, waited: float) -> None:
        if waited < 2:
            return
        if self._last()["step"] == self.total_steps and len(self.runs) < len(self.labels):
            start = f"run {len(self.runs) + 1} of {len(self.labels)}, {self.labels[len(self.runs)]}: starting"
            self._show(f"{start} ... {waited:.0f} s")
        else:
            self._show(f"{self._state()} ({waited:.0f} s ago)")

    def _show_end(self) -> None:
        if self.line.in_notebook:
            steps = sum(len(rows) for rows in self.runs)
            runs = "1 run" if len(self.runs) == 1 else f"{len(self.runs)} runs"
            self.line.show(f"{self.title}: {runs}, {steps} steps")
        elif self.line.is_live or self._last() is not self._shown:
            self.line.keep(self._state())

    def _show(self, text: str) -> None:
        self.line.show(text)
        self._last_shown, self._shown = time.monotonic(), self._last()

    def _last(self) -> Row:
        return self.runs[-1][-1]

    def _label(self, index: int) -> str:
        if index < len(self.labels):
            return self.labels[index]
        return self.title if len(self.runs) == 1 else f"{self.title} {index + 1}"

    def _state(self) -> str:
        last = self._last()
        of_all = f"run {len(self.runs)} of {len(self.labels)}, " if self.labels else ""
        of_total = f" of {self.total_steps}" if self.total_steps else ""
        text = f"{of_all}{self._label(len(self.runs) - 1)}: step {last['step']}{of_total}, loss {last['loss']:.4f}"
        if last.keys() >= {"tokens", "seconds"}:  # a reader's own loop may report less
            text += f", {last['tokens'] / max(float(last['seconds']), 1e-9):.0f} tokens/s"
            text += f"; about {duration(self._seconds_left())} left" if self._steps_left() else ""
        return text

    def _steps_left(self) -> int:
        return max(0, (self.total_steps or 0) - self._last()["step"])

    def _seconds_left(self) -> float:
        recent = self.runs[-1][-10:]
        return self._steps_left() * sum(float(row["seconds"]) for row in recent) / len(recent)


class LiveCurve(Progress):
    """A loss curve in a notebook's output, redrawn while workers run; at the end one figure remains.

    Args:
        total_steps: as for :class:`Progress`.
        title: name of the activity. The final figure's title also states the first and the last loss.
        labels: names of the runs.
        interval: minimum number of seconds between drawings, to leave the CPU to the run.
    """

    def __init__(
        self,
        total_steps: int | None,
        *,
        title: str = "training",
        labels: Sequence[str] = (),
        interval: float = 2.0,
    ) -> None:
        super().__init__(total_steps, title=title, labels=labels, interval=interval)
        self._last_shown = 0.0
        self._drawn_rows = 0

    def _update(self) -> None:
        if time.monotonic() - self._last_shown >= self.interval:
            self._show(self._state())

    def _refresh_run(self, waited: float) -> None:
        if sum(map(len, self.runs)) > self._drawn_rows:
            self._update()

    def _show_end(self) -> None:
        first, last = self.runs[-1][0]["loss"], self._last()["loss"]
        runs = "" if len(self.runs) == 1 else f"{len(self.runs)} runs, the last: "
        self._show(f"{self.title}: {runs}loss {first:.3f} to {last:.3f} at step {self._last()['step']}")

    def _show(self, text: str) -> None:
        curves = {self._label(index): rows for index, rows in enumerate(self.runs)}
        alt = "Training loss over optimizer steps. " + " ".join(
            f"{label}: {rows[0]['loss']:.3f} at step {rows[0]['step']}, {rows[-1]['loss']:.3f} at step "
            f"{rows[-1]['step']}."
            for label, rows in curves.items()
        )
        drawn = figures.loss_curves(curves, title=text, alt=alt, total_steps=self.total_steps)
        self.line.show_bundle(*drawn.bundle())
        self._last_shown, self._drawn_rows = time.monotonic(), sum(map(len, self.runs))


def progress(
    total_steps: int | None, *, title: str = "training", labels: Sequence[str] = (), curve: bool = True
) -> Progress:
    """Return a live curve in a notebook, or a status line elsewhere.

    Args:
        total_steps: optimizer steps of each run, or None if only its epochs are known.
        title: name of the activity.
        labels: names of the runs, in order, if there are several.
        curve: in a notebook, draw a curve; otherwise one line names the current run.
    """
    kind = LiveCurve if curve and display.in_notebook() else Progress
    return kind(total_steps, title=title, labels=labels)


def duration(seconds: float) -> str:
    """Format a duration: ``12 s``, ``3 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
