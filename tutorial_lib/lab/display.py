"""Tables and numbers, formatted for notebooks, terminals and rendered pages."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        """Return an HTML table without colours of its own, so that any theme's text and background apply."""
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
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]

        def line(values: Sequence[str]) -> str:
            cells = zip(values, widths, self.numeric, strict=True)
            return "  ".join(v.rjust(w) if n else v.ljust(w) for v, w, n in cells).rstrip()

        rule = "  ".join("-" * w for w in widths)
        top = [self.caption] if self.caption else []
        return "\n".join([*top, line(self.columns), rule, *(line(row) for row in self.rows)])


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, *, caption: str = "") -> Table:
    """Build a table from rows, to be printed or to end a notebook cell.

    Args:
        rows: values by column; a missing value or ``None`` shows as a dash. Numbers are formatted by
            :func:`format_value`; pass text for any other format.
        columns: columns to show, in this order; default: in order of first appearance.
        caption: the message of the table.
    """
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    values = [[row.get(name) for name in names] for row in rows]
    numeric = [
        all(v is None or (_is_number(v) and not isinstance(v, bool)) for v in column)
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


def format_bytes(num_bytes: float) -> str:
    """Format bytes with a binary unit: exact below 10 KiB (``9,840 B``), ``1.33 MiB`` above."""
    if abs(num_bytes) < 10 * 1024:
        return f"{num_bytes:,.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if abs(num_bytes) < 1024:
            return f"{num_bytes:,.4g} {unit}"
    return f"{num_bytes / 1024:,.4g} TiB"


def in_notebook() -> bool:
    """Return whether this process is a Jupyter kernel."""
    import sys

    # Asking IPython would import it, although workers and scripts do not need it.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def show(bundle: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Display a MIME bundle in a notebook; elsewhere print its ``text/plain``."""
    if in_notebook():
        from IPython.display import display

        display(dict(bundle), raw=True, metadata=dict(metadata or {}))
    else:
        print(bundle["text/plain"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
