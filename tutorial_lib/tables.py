"""Tables: rows of text as aligned columns, Markdown or HTML, and the formats of the numbers in them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

_CELL = "padding:0.2em 0.8em;border-bottom:1px solid rgba(128,128,128,0.35)"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text: HTML in a notebook, aligned columns as plain text. Numbers are right-aligned."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    caption: str = ""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": str(self)}

    def html(self) -> str:
        """Return an HTML table that sets no colour but the border's, so that text and background follow the theme."""
        align = ["right" if n else "left" for n in self.numeric]
        head = "".join(
            f'<th scope="col" style="{_CELL};text-align:{a}">{html.escape(c)}</th>'
            for c, a in zip(self.columns, align, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="{_CELL};text-align:{a}">{html.escape(v)}</td>' for v, a in zip(row, align, strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        caption = f'<caption style="text-align:left">{html.escape(self.caption)}</caption>' if self.caption else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __str__(self) -> str:
        lines = align([self.columns, *self.rows], self.numeric)
        rule = "  ".join("-" * max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True))
        return "\n".join([*([self.caption] if self.caption else []), lines[0], rule, *lines[1:]])

    def markdown(self) -> str:
        """Return a Markdown table, without the caption."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = ["---:" if numeric else "---" for numeric in self.numeric]
        return "\n".join(map(line, [self.columns, rule, *self.rows]))


def align(
    rows: Iterable[Sequence[str]],
    numeric: Sequence[bool],
    *,
    least: Sequence[int] = (),
    gaps: Sequence[str] = (),
) -> list[str]:
    """Pad the cells of each column to the same width, and return a line of text per row.

    Args:
        rows: cells of text, with any header as the first row.
        numeric: whether each column is right-aligned, as numbers are.
        least: smallest width of each column; default: as wide as its widest cell.
        gaps: text between each column and the next; default: two spaces.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if least:
        widths = list(map(max, widths, least))
    after = [*gaps, ""] if gaps else ["  "] * len(widths)
    columns = list(zip(widths, numeric, after, strict=True))
    return [
        "".join(
            (cell.rjust(width) if right else cell.ljust(width)) + gap
            for cell, (width, right, gap) in zip(row, columns, strict=True)
        ).rstrip()
        for row in rows
    ]


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, *, caption: str = "") -> Table:
    """Build a table from rows, to print or to show in a notebook.

    Args:
        rows: values by column; a missing value or ``None`` shows as a dash. Numbers are formatted by
            :func:`format_value`; pass text for any other format.
        columns: columns to show, in this order; default: in order of first appearance.
        caption: line above the table.
    """
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    values = [[row.get(name) for name in names] for row in rows]
    numeric = [
        all(v is None or is_number(v) for v in column)
        for column in (zip(*values, strict=True) if values else [()] * len(names))
    ]
    return Table(
        tuple(names), tuple(tuple(format_value(v) for v in row) for row in values), tuple(numeric), caption=caption
    )


def format_value(value: Any) -> str:
    """Format a value: thousands with commas, fractions with six significant digits, ``None`` as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if math.isfinite(value) and value == int(value) and 1000 <= abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(v) for v in value)
    return str(value)


def format_short(number: float) -> str:
    """Format a measurement with about three digits and no exponent for large ones: ``0.0125``, ``4.35``, ``4,347``."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def format_bytes(num_bytes: float) -> str:
    """Format bytes with a binary unit: exact below 10 KiB (``9,840 B``), ``1.33 MiB`` above."""
    if abs(num_bytes) < 10 * 1024:
        return f"{num_bytes:,.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if abs(num_bytes) < 1024:
            return f"{num_bytes:,.4g} {unit}"
    return f"{num_bytes / 1024:,.4g} TiB"


def is_number(value: Any) -> bool:
    """Return whether a value is a Python or NumPy real number. A bool does not count as one."""
    return isinstance(value, Real) and not isinstance(value, bool)
