"""Progress of a run: a curve or a line in a notebook, a bar in a terminal, occasional lines in a log.

All of them receive new rows of ``metrics.jsonl`` from the process that started the run:

>>> with progress(total_steps=60) as shown:
...     run(config, on_rows=shown.on_rows)
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tutorial_lib.lab import display, figures

Row = Mapping[str, Any]


class Progress:
    """Base class: receives rows until :meth:`close`. A context manager that closes itself.

    Several runs may follow one another: when the step number goes back, the next run has started. While processes start
    and there is no step yet, :meth:`start` shows that the run is starting.

    Args:
        total_steps: optimizer steps of each run, or None if only its epochs are known.
        title: name of the activity.
        labels: names of the runs, in order, if there are several.
    """

    def __init__(self, total_steps: int | None, *, title: str = "training", labels: Sequence[str] = ()) -> None:
        self.total_steps = total_steps
        self.title = title
        self.labels = labels
        self.runs: list[list[Row]] = []

    def on_rows(self, rows: Sequence[Row]) -> None:
        """Receive the rows that are new since the last call."""
        for row in rows:
            if not self.runs or row["step"] <= self.runs[-1][-1]["step"]:
                self.runs.append([])
            self.runs[-1].append(row)
        if rows:
            self._update()

    def start(self) -> None:
        """Show that the run is starting. :meth:`__enter__` calls this."""

    def close(self) -> None:
        """Show the final state. Safe to call twice."""

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _update(self) -> None:
        raise NotImplementedError

    def _last(self) -> Row:
        return self.runs[-1][-1]

    def _label(self, index: int) -> str:
        if index < len(self.labels):
            return self.labels[index]
        return self.title if len(self.runs) == 1 else f"{self.title} {index + 1}"

    def _state(self) -> str:
        of_total = f" of {self.total_steps}" if self.total_steps else ""
        return (
            f"{self._label(len(self.runs) - 1)}: step {self._last()['step']}{of_total}, loss {self._last()['loss']:.4f}"
        )


class NotebookProgress(Progress):
    """One output of a cell, updated while workers run: the common part of the live curve and the live line.

    A thread refreshes it twice a second, so that a waiting reader sees the seconds go by, and sees the latest rows even
    if no more follow.
    """

    _BEAT_SECONDS = 0.5

    def __init__(self, total_steps: int | None, *, title: str = "training", labels: Sequence[str] = ()) -> None:
        super().__init__(total_steps, title=title, labels=labels)
        self._display_id: str | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heartbeat: threading.Thread | None = None
        self._last_news = time.monotonic()

    def start(self) -> None:
        self._last_news = time.monotonic()
        self.show({"text/plain": f"{self.title}: starting processes ..."})
        self._heartbeat = threading.Thread(target=self._beat, name="progress", daemon=True)
        self._heartbeat.start()

    def on_rows(self, rows: Sequence[Row]) -> None:
        with self._lock:
            if rows:
                self._last_news = time.monotonic()
            super().on_rows(rows)

    def close(self) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        if self._heartbeat:
            self._heartbeat.join()
        if self.runs:
            self._show_end()

    def __exit__(self, *error: object) -> None:
        self.close()
        if not self.runs:
            failed = error[0].__name__ if isinstance(error[0], type) else None
            why = f"no step, {failed}" if failed else "no step was left to train"
            self.show({"text/plain": f"{self.title}: {why}"})

    def _beat(self) -> None:
        while not self._ended.wait(self._BEAT_SECONDS):
            with self._lock:
                if self.runs:
                    self._refresh()
                else:
                    self.show({"text/plain": f"{self.title}: starting processes ... {self._waited():.0f} s"})

    def _refresh(self) -> None:
        """Update everything that changes without new rows. The heartbeat calls this."""
        raise NotImplementedError

    def _show_end(self) -> None:
        raise NotImplementedError

    def _waited(self) -> float:
        """Return the seconds since the last row, or since the start."""
        return time.monotonic() - self._last_news

    def _starts_next(self) -> str | None:
        """Return the label of the run that is starting, if the run before it has ended."""
        if self.runs and self._last()["step"] == self.total_steps and len(self.runs) < len(self.labels):
            return self.labels[len(self.runs)]
        return None

    def show(self, data: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Replace the notebook's output by another one, by MIME type."""
        from IPython.display import display, update_display

        shown: dict[str, Any] = {"metadata": dict(metadata or {}), "raw": True}
        if self._display_id is None:
            self._display_id = display(dict(data), display_id=True, **shown).display_id
        else:
            update_display(dict(data), display_id=self._display_id, **shown)


class LiveLine(NotebookProgress):
    """A line in a notebook's output that names the current run, and at the end counts all runs."""

    def _show_end(self) -> None:
        steps = sum(len(rows) for rows in self.runs)
        runs = "1 run" if len(self.runs) == 1 else f"{len(self.runs)} runs"
        self.show({"text/plain": f"{self.title}: {runs}, {steps} steps"})

    def _update(self) -> None:
        of_all = f"run {len(self.runs)} of {len(self.labels)}, " if self.labels else ""
        self.show({"text/plain": of_all + self._state()})

    def _refresh(self) -> None:
        if self._waited() < 2:
            return
        if label := self._starts_next():
            start = f"run {len(self.runs) + 1} of {len(self.labels)}, {label}: starting"
            self.show({"text/plain": f"{start} ... {self._waited():.0f} s"})
        else:
            self.show({"text/plain": f"{self._state()} ({self._waited():.0f} s ago)"})


class LiveCurve(NotebookProgress):
    """A loss curve in a notebook's output, redrawn while workers run; at the end one figure remains.

    Args:
        total_steps: as for :class:`Progress`, like ``title`` and ``labels``.
        title: name of the activity. The final figure's title also states the first and the last loss.
        labels: names of the runs.
        interval: minimum number of seconds between drawings, to leave the processor to the run.
    """

    def __init__(
        self,
        total_steps: int | None,
        *,
        title: str = "training",
        labels: Sequence[str] = (),
        interval: float = 2.0,
    ) -> None:
        super().__init__(total_steps, title=title, labels=labels)
        self.interval = interval
        self._drawn = 0.0
        self._drawn_rows = 0

    def _show_end(self) -> None:
        first, last = self.runs[-1][0]["loss"], self._last()["loss"]
        runs = "" if len(self.runs) == 1 else f"{len(self.runs)} runs, the last: "
        self._draw(f"{self.title}: {runs}loss {first:.3f} to {last:.3f} at step {self._last()['step']}")

    def _update(self) -> None:
        if time.monotonic() - self._drawn >= self.interval:
            self._draw(self._state())

    def _refresh(self) -> None:
        if sum(map(len, self.runs)) > self._drawn_rows:
            self._update()

    def _draw(self, title: str) -> None:
        curves = {self._label(index): rows for index, rows in enumerate(self.runs)}
        alt = "Training loss over optimizer steps. " + " ".join(
            f"{label}: {rows[0]['loss']:.3f} at step {rows[0]['step']}, {rows[-1]['loss']:.3f} at step "
            f"{rows[-1]['step']}."
            for label, rows in curves.items()
        )
        self.show(*figures.loss_curves(curves, title=title, alt=alt, total_steps=self.total_steps).bundle())
        self._drawn, self._drawn_rows = time.monotonic(), sum(map(len, self.runs))


class TerminalBar(Progress):
    """A bar in a terminal, with the loss and the speed of the last step."""

    def __init__(
        self,
        total_steps: int | None,
        *,
        title: str = "training",
        labels: Sequence[str] = (),
        file: TextIO | None = None,
    ) -> None:
        super().__init__(total_steps, title=title, labels=labels)
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._file = file or sys.stderr
        self._new_bar = lambda: tqdm(total=total_steps, unit="step", file=self._file)
        self._bars: list[Any] = []

    def start(self) -> None:
        print(f"{self.title}: starting processes ...", file=self._file, flush=True)

    def close(self) -> None:
        for bar in self._bars:
            bar.close()

    def _update(self) -> None:
        while len(self._bars) < len(self.runs):
            self.close()
            self._bars.append(self._new_bar())
            # A resumed run starts in the middle.
            self._bars[-1].initial = self.runs[len(self._bars) - 1][0]["step"] - 1
        last, bar = self._last(), self._bars[-1]
        bar.set_description(self._label(len(self.runs) - 1), refresh=False)
        bar.set_postfix(loss=f"{last['loss']:.4f}", tokens_per_s=f"{_speed(last):.0f}", refresh=False)
        bar.update(last["step"] - bar.n)


class LogLines(Progress):
    """A line every few seconds, for a log that no one watches live.

    Args:
        total_steps: as for :class:`Progress`, like ``title`` and ``labels``.
        title: name of the activity.
        labels: names of the runs.
        interval: minimum number of seconds between lines. The last step is always reported.
        file: where to write; default: standard error.
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
        super().__init__(total_steps, title=title, labels=labels)
        self.interval = interval
        self._file = file or sys.stderr
        self._written = time.monotonic()
        self._reported: Row | None = None

    def start(self) -> None:
        print(f"{self.title}: starting processes ...", file=self._file, flush=True)

    def close(self) -> None:
        if self.runs and self._last() is not self._reported:
            self._write()

    def _update(self) -> None:
        if time.monotonic() - self._written >= self.interval:
            self._write()

    def _write(self) -> None:
        print(f"{self._state()}, {_speed(self._last()):.0f} tokens/s", file=self._file, flush=True)
        self._written, self._reported = time.monotonic(), self._last()


def progress(
    total_steps: int | None, *, title: str = "training", labels: Sequence[str] = (), curve: bool = True
) -> Progress:
    """Choose the right kind of progress for this process: notebook, terminal or log.

    Args:
        total_steps: optimizer steps of each run, or None if only its epochs are known.
        title: name of the activity.
        labels: names of the runs, in order, if there are several.
        curve: in a notebook, draw a curve; otherwise one line names the current run.
    """
    if display.in_notebook():
        kind = LiveCurve if curve else LiveLine
        return kind(total_steps, title=title, labels=labels)
    if sys.stderr.isatty():
        return TerminalBar(total_steps, title=title, labels=labels)
    return LogLines(total_steps, title=title, labels=labels)


def _speed(row: Row) -> float:
    """Return the tokens per second of one step, over all ranks."""
    return float(row["tokens"]) / max(float(row["seconds"]), 1e-9)
