"""Comparison of two rows, or of two matrices row by row: memory saved and time added."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.bench.experiments import workshop_name
from tutorial_lib.bench.matrix import MATRIX_FILE, Matrix
from tutorial_lib.bench.record import RowRecord
from tutorial_lib.config import ConfigError
from tutorial_lib.measure.memory_log import MIB
from tutorial_lib.tables import Table, format_short


@dataclass(frozen=True, slots=True)
class Difference:
    """Cost of one row compared with another, in bytes and seconds.

    Attributes:
        rows: the name that both rows have, or both names.
        memory: kind of memory: ``process tree`` (peak of all processes together), ``GPU`` (peak of the fullest GPU), or
            ``states per rank``.
        memory_without: bytes of the first row.
        memory_with: bytes of the second row.
        runtime_without: seconds of all optimizer steps of the first row.
        runtime_with: seconds of all optimizer steps of the second row.
    """

    rows: str
    memory: str
    memory_without: float
    memory_with: float
    runtime_without: float
    runtime_with: float

    @property
    def saving_percent(self) -> float:
        """Memory that the second row saves, as a percentage of the first row's memory."""
        return 100 * (1 - self.memory_with / self.memory_without)

    @property
    def change_percent(self) -> float:
        """Runtime that the second row adds, as a percentage of the first row's runtime."""
        return 100 * (self.runtime_with / self.runtime_without - 1)


@dataclass(frozen=True)
class Comparison:
    """Differences between two rows, or between rows of the same name in two matrices.

    Attributes:
        title: names of the two rows or matrices.
        differences: one for each pair of rows and each kind of memory that was measured in both rows.
    """

    title: str
    differences: tuple[Difference, ...]

    def table(self) -> Table:
        """Return the table, which a notebook displays as HTML."""
        columns = (
            "rows", "memory of", "memory without (MiB)", "memory with (MiB)", "saving (%)",
            "runtime without (s)", "runtime with (s)", "change (%)",
        )  # fmt: skip
        cells = tuple(
            (
                each.rows, each.memory, f"{each.memory_without / MIB:,.2f}", f"{each.memory_with / MIB:,.2f}",
                f"{each.saving_percent:.1f}", format_short(each.runtime_without), format_short(each.runtime_with),
                f"{each.change_percent:+.1f}",
            )
            for each in self.differences
        )  # fmt: skip
        return Table(columns, cells, tuple(index > 1 for index in range(len(columns))), caption=self.title)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison, ready for JSON."""
        differences = [
            {
                **dataclasses.asdict(each),
                "saving_percent": each.saving_percent,
                "change_percent": each.change_percent,
            }
            for each in self.differences
        ]
        return {"title": self.title, "differences": differences}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.table()._repr_mimebundle_()


def compare(without: str | Path, with_: str | Path, *, storage: str | Path = "runs") -> Comparison:
    """Compare two rows, or two matrices row by row.

    Args:
        without: ``MATRIX/ROW``, ``MATRIX``, or the directory of a matrix or of a row. A row may also be given by
            its name in the workshop (``2ZO-1G1N``).
        with_: the row or matrix to compare with it.
        storage: directory of matrices that are given by name only.

    Raises:
        ConfigError: a row does not exist or is not done, or the two have nothing to compare.
    """
    first, second = (_find(name, Path(storage)) for name in (without, with_))
    if isinstance(first, RowRecord) and isinstance(second, RowRecord):
        title = f"{without} (without) and {with_} (with)"
        return Comparison(title, tuple(_differences(f"{first.name}, {second.name}", first, second)))
    if isinstance(first, Matrix) and isinstance(second, Matrix):
        in_second = {row.name for row in second.rows}
        names = [row.name for row in first.rows if row.name in in_second]
        if not names:
            raise ConfigError(f"{without} and {with_} have no row of the same name. Write MATRIX/ROW for each.")
        found = [each for name in names for each in _differences(name, _done(first[name]), _done(second[name]))]
        return Comparison(f"{without} (without) and {with_} (with)", tuple(found))
    raise ConfigError(f"{without} and {with_}: one is a row, the other a matrix. Name two rows, or two matrices.")


def _find(name: str | Path, storage: Path) -> RowRecord | Matrix:
    """Find a matrix or a finished row by name or by directory."""
    for path in (Path(name).expanduser(), storage.expanduser() / name):
        if (path / MATRIX_FILE).is_file():
            return Matrix.read(path)
        for matrix in (path.parent, path.parent.parent):  # MATRIX/ROW, MATRIX/rows/ROW
            if (matrix / MATRIX_FILE).is_file():
                return _done(_row(Matrix.read(matrix), path.name))
    raise ConfigError(
        f"There is no matrix {str(name)!r}, here or in {storage}. Write MATRIX/ROW or MATRIX, as named by bench, and "
        "--storage if it is elsewhere."
    )


def _row(matrix: Matrix, name: str) -> RowRecord:
    wanted = workshop_name(name)
    for row in matrix.rows:
        if row.name == name or (wanted and wanted.items() <= row.settings.items()):
            return row
    known = ", ".join(row.name for row in matrix.rows)
    raise ConfigError(f"{matrix.path} has no row {name!r}. Write one of: {known}.")


def _done(row: RowRecord) -> RowRecord:
    if row.is_done:
        return row
    why = f" ({row.cause})" if row.cause else ""
    again = "bench with --retry runs it again" if row.has_failed else "bench runs it"
    raise ConfigError(f"Row {row.name!r} is not done: {row.status}{why}. There is nothing to compare until {again}.")


_KINDS: dict[str, Callable[[RowRecord], float | None]] = {
    "process tree": lambda row: row.process_tree.peak if row.process_tree else None,
    "GPU": lambda row: row.gpu.peak if row.gpu else None,
    "states per rank": lambda row: row.states_bytes,
}


def _differences(label: str, first: RowRecord, second: RowRecord) -> list[Difference]:
    if not first.train_seconds or not second.train_seconds:
        raise ConfigError(f"{label}: no step was timed. Run more steps.")
    found = []
    for kind, held in _KINDS.items():
        before, after = held(first), held(second)
        if before and after is not None:
            found.append(Difference(label, kind, before, after, first.train_seconds, second.train_seconds))
    if not found:
        raise ConfigError(f"{label}: no kind of memory was measured in both rows.")
    return found
