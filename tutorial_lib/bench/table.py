"""Tables of a matrix, for notebooks, terminals, spreadsheets and Markdown, from the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.bench.experiments import IS_SCALING
from tutorial_lib.bench.record import RowRecord
from tutorial_lib.measure.memory_log import MIB, MemorySummary
from tutorial_lib.records import write_atomically
from tutorial_lib.tables import Table

NOT_MEASURED, NOT_PREDICTED = "not measured", "not predicted"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a matrix's table.

    Attributes:
        title: title, with its unit.
        about: ``speed`` or ``memory``; ``both`` for columns that every table shows.
        value: function that takes a row and returns a number, a text, or None if it was not measured.
        form: format of a number.
        absent: text for a finished row without a value.
    """

    title: str
    about: str
    value: Callable[[RowRecord], Any]
    form: str = ".4g"
    absent: str = NOT_MEASURED


def _mib(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / MIB


def _memory_columns(label: str, of: Callable[[RowRecord], MemorySummary | None]) -> list[Column]:
    def part(get: Callable[[MemorySummary], Any]) -> Callable[[RowRecord], Any]:
        def value(row: RowRecord) -> Any:
            memory = of(row)
            return None if memory is None else get(memory)

        return value

    def modes(memory: MemorySummary) -> str:
        return ", ".join(f"{mode / MIB:.0f}" for mode in memory.modes[:3]) or "all differ"

    return [
        Column(f"{label} peak (MiB)", "memory", part(lambda m: m.peak / MIB), ",.0f"),
        Column(f"{label} average (MiB)", "memory", part(lambda m: m.mean / MIB), ",.0f"),
        Column(f"{label} mode (MiB)", "memory", part(modes)),
    ]


def columns(experiment: str, rows: Sequence[RowRecord]) -> list[Column]:
    """Return the columns of a matrix's table."""
    efficiency = _efficiencies(rows)
    found = [
        Column("row", "both", lambda r: r.name),
        Column("status", "both", lambda r: r.status),
        Column("train loss", "speed", lambda r: r.train_loss, ".4f"),
        Column("eval loss", "speed", lambda r: " ".join(f"{loss:.4f}" for loss in r.eval_losses) or None),
        Column("train samples/s", "speed", lambda r: r.samples_per_second),
        Column("eval samples/s", "speed", lambda r: r.eval_samples_per_second),
        Column("s/step (median)", "speed", lambda r: r.step_seconds),
        Column("predicted s/step", "speed", lambda r: r.predicted_step_seconds, absent=NOT_PREDICTED),
        Column("steps/epoch", "speed", lambda r: r.steps_per_epoch, ",d"),
        Column("steps", "speed", lambda r: r.num_steps, ",d"),
        Column("processes", "speed", lambda r: r.world_size, "d"),
    ]
    if experiment in IS_SCALING:
        found.append(Column("efficiency (%)", "speed", lambda r: efficiency.get(r.name), ".1f"))
    found += _memory_columns("process tree", lambda r: r.process_tree)
    found += _memory_columns("GPU", lambda r: r.gpu)
    return [
        *found,
        Column("states/rank (MiB)", "memory", lambda r: _mib(r.states_bytes), ",.2f"),
        Column("predicted (MiB)", "memory", lambda r: _mib(r.predicted_bytes), ",.2f", NOT_PREDICTED),
        Column("error (%)", "memory", lambda r: r.error_percent, "+.2f"),
        Column("step peak (MiB)", "memory", lambda r: _mib(r.peak_bytes), ",.1f"),
        Column("predicted peak (MiB)", "memory", lambda r: _mib(r.predicted_peak_bytes), ",.1f", NOT_PREDICTED),
    ]


def build(experiment: str, rows: Sequence[RowRecord], about: str = "all", only: Sequence[str] = ()) -> Table:
    """Build the table for notebooks and terminals.

    Args:
        experiment: name of the experiment.
        rows: rows of the matrix.
        about: ``speed``, ``memory`` or ``all``: the columns to show.
        only: titles of columns, in the order in which to show them; default: all that ``about`` asks for.
    """
    if about not in ("all", "speed", "memory"):
        raise ValueError(f"about={about!r}. Write 'all', 'speed' or 'memory'.")
    shown = [column for column in columns(experiment, rows) if about in ("all", column.about) or column.about == "both"]
    if only:
        by_title = {column.title: column for column in shown}
        if unknown := [title for title in only if title not in by_title]:
            raise ValueError(f"There is no column {unknown[0]!r}. Use only: {', '.join(by_title)}.")
        shown = [by_title[title] for title in only]
    cells = tuple(tuple(_cell(row, column) for column in shown) for row in rows)
    numeric = tuple(column.title not in ("row", "status") for column in shown)
    return Table(tuple(column.title for column in shown), cells, numeric, caption=experiment)


def remarks(rows: Sequence[RowRecord]) -> list[str]:
    """Return a line for each row that stopped or failed, with its cause, and one for each note."""
    return [f"{row.name}: {row.status}: {row.cause}" for row in rows if row.cause] + [
        f"{row.name}: {row.note}" for row in rows if row.note
    ]


def write(experiment: str, rows: Sequence[RowRecord], directory: Path) -> None:
    """Write ``table.csv`` with plain numbers, and ``table.md`` with formatted ones."""
    shown = columns(experiment, rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(column.title for column in shown), "cause"])
    for row in rows:
        writer.writerow([*(_plain(column.value(row)) for column in shown), row.cause or ""])
    write_atomically(directory / "table.csv", text.getvalue())
    write_atomically(directory / "table.md", markdown(build(experiment, rows), remarks(rows)))


def markdown(table: Table, remarks: Sequence[str] = ()) -> str:
    """Return a page with the table and the remarks below it."""
    listed = ["", *(f"- {remark}" for remark in remarks)] if remarks else []
    return "\n".join([f"# {table.caption}", "", table.markdown(), *listed]) + "\n"


def _cell(row: RowRecord, column: Column) -> str:
    value = column.value(row)
    if value is None:
        return column.absent if row.is_done else "-"
    return value if isinstance(value, str) else format(value, column.form)


def _plain(value: Any) -> Any:
    return "" if value is None else value


def _efficiencies(rows: Sequence[RowRecord]) -> dict[str, float]:
    """Return each row's samples per second per process, in percent of the value with the fewest processes."""
    per_process = {
        row.name: row.samples_per_second / row.world_size
        for row in sorted(rows, key=lambda row: row.world_size or 0)
        if row.samples_per_second and row.world_size
    }
    first = next(iter(per_process.values()), None)
    return {name: 100 * speed / first for name, speed in per_process.items()} if first else {}
