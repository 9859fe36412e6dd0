"""Figures of the course: one palette, drawn from plain rows and dictionaries.

Every function returns a :class:`Figure`, which a notebook displays as a cell's last expression. Conventions: the title
states the finding, axis labels have units, and ``alt`` describes the picture in words, for readers who cannot see it.
The background is white even on dark pages, because no grey stands out by 4.5 : 1 from both white and the dark grey of
such a page. The same numbers always give the same bytes: a file has neither a date nor random ids.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from tutorial_lib.tables import format_short

BLUE, ORANGE, GREEN, PURPLE, RED = "#3a86d1", "#d97a1e", "#2e9e73", "#9a6fd0", "#d1495b"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED)
"""Colours in order of use: at least 3 : 1 against the background, and distinct for colour-blind readers."""

PAPER, INK = "#ffffff", "#4a4a4a"
"""Colour of the background, and of text and axes: at least 4.5 : 1 against each other."""

PARTS = {"parameters": BLUE, "gradients": ORANGE, "optimizer": GREEN}
"""The parts of the model states, each with its colour throughout the course."""

_TOTAL = {"total": INK}

_DPI = 144


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawn figure with its title and its description in words."""

    png: bytes = field(repr=False)
    title: str
    alt: str
    width: int
    """Width at which to show it, in CSS pixels; the image has twice as many."""
    height: int

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        return self.bundle()

    def bundle(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Return MIME data and metadata: the image with its alt text, and the alt text for places without images."""
        data = {"image/png": base64.b64encode(self.png).decode(), "text/plain": f"{self.title}\n{self.alt}"}
        return data, {"image/png": {"alt": self.alt, "width": self.width, "height": self.height}}


def loss_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str,
    alt: str,
    marks: Mapping[str, int] | None = None,
    total_steps: int | None = None,
) -> Figure:
    """Draw a curve per run over optimizer steps.

    Curves on top of each other stay visible: later ones are thinner, with different dashes.

    Args:
        runs: rows of ``metrics.jsonl`` by the run's label.
        title: the finding.
        alt: the figure in words.
        marks: labelled vertical lines at optimizer steps (``{"stopped": 20}``).
        total_steps: last step of the runs, so that an unfinished curve shows its progress.
    """
    series = {label: ([row["step"] for row in rows], [row["loss"] for row in rows]) for label, rows in runs.items()}
    return lines(
        series, title=title, alt=alt, x_label="optimizer step", y_label="loss (nats per token)", marks=marks,
        x_end=total_steps if total_steps and total_steps > 1 else None,
    )  # fmt: skip


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    alt: str,
    x_label: str,
    y_label: str,
    marks: Mapping[str, float] | None = None,
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    notes: Mapping[str, tuple[float, float]] | None = None,
    log: bool = False,
    x_end: float | None = None,
    y_start: float | None = None,
) -> Figure:
    """Draw a line per series of ``(x values, y values)``. See :func:`loss_curves` for the other arguments.

    Args:
        series: the lines by label.
        points: series drawn as circles, such as measurements over the lines of formulas. Circles with a line's label
            take its colour and its entry in the legend.
        notes: texts, each with its centre.
        log: logarithmic axes.
        x_end: draw the horizontal axis from 1 to at least this value; default: fit the values.
        y_start: start of the vertical axis; default: fit the values.
    """
    with styled_axes(title, alt, size=(7.0, 3.6)) as (axes, drawn):
        dashes = ("-", (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1)))
        for index, (label, (xs, values)) in enumerate(series.items()):
            if len(xs) != len(values) or len(values) == 0:
                raise ValueError(
                    f"The line {label!r} has {len(values)} values for {len(xs)} places. A run that resumes "
                    "returns only the losses of its new steps: first run the cell again that began it, then this one."
                )
            axes.plot(
                xs,
                values,
                label=label,
                color=PALETTE[index % len(PALETTE)],
                linewidth=max(1.6, 3.4 - 0.6 * index) if len(series) > 1 else 2.0,
                linestyle=dashes[index % len(dashes)],
                marker="o" if len(xs) == 1 else None,
            )
        colors = {line.get_label(): line.get_color() for line in axes.get_lines()}
        for label, (xs, values) in (points or {}).items():
            style = {"markersize": 9, "fillstyle": "none", "markeredgewidth": 1.8}
            own = {"color": colors[label]} if label in colors else {"color": INK, "label": label}
            axes.plot(xs, values, "o", **style, **own)
        for text, at in (marks or {}).items():
            axes.axvline(at, color=INK, linewidth=1, linestyle=":")
            axes.annotate(
                text, (at, 1), xycoords=("data", "axes fraction"), xytext=(4, -11), textcoords="offset points"
            )
        for text, center in (notes or {}).items():
            axes.annotate(text, center, ha="center", va="center")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                _label_log_scale(axis)
        else:
            _whole_numbers(axes.xaxis, [x for xs, _ in series.values() for x in xs])
        if x_end is not None:
            margin = 0.02 * x_end
            axes.set_xlim(1 - margin, max([x_end, *(x for xs, _ in series.values() for x in xs)]) + margin)
        if y_start is not None:
            axes.set_ylim(bottom=y_start)
        if points or (marks and len(series) > 1):  # these may be anywhere and leave no room for a legend inside
            labels = dict.fromkeys([*series, *(points or {})])
            rows = 1 + sum(len(label) + 11 for label in labels) // 94  # about 94 characters fit side by side
            axes.figure.legend(frameon=False, ncols=-(-len(labels) // rows), loc="outside lower center", handlelength=3)
        elif len(series) > 1:
            axes.legend(frameon=False, handlelength=3)
    return drawn[0]


def memory_timeline(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    alt: str,
    unit: str = "MiB",
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Draw a line per process or GPU: its memory over time, from zero up.

    See :func:`loss_curves` for the other arguments.

    Args:
        series: seconds and bytes by label, for example from ``read_memory_log(path).timeline()``.
        unit: ``B``, ``kB``, ``MB``, ``GB``, ``KiB``, ``MiB`` or ``GiB``.
        marks: labelled vertical lines, by their time in seconds (``{"first step": 4.2}``).
    """
    scaled = {label: (xs, [held / _UNITS[unit] for held in values]) for label, (xs, values) in series.items()}
    return lines(
        scaled, title=title, alt=alt, x_label="time (s)", y_label=f"memory held ({unit})", marks=marks, y_start=0
    )


def bars(values: Mapping[str, float], *, title: str, alt: str, unit: str) -> Figure:
    """Draw a horizontal bar per value, each with its number.

    Args:
        values: numbers by label, drawn from top to bottom.
        title: the finding.
        alt: the figure in words.
        unit: name and unit of the values, for the axis.
    """
    with styled_axes(title, alt, size=(7.0, 1.3 + 0.38 * len(values)), grid="x") as (axes, drawn):
        container = axes.barh(list(values), list(values.values()), color=BLUE, height=0.62)
        axes.bar_label(container, labels=[format_short(v) for v in values.values()], padding=4, color=INK)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.12)
    return drawn[0]


def grouped_memory(
    states: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    title: str,
    alt: str,
    y_label: str = "model states per rank",
) -> Figure:
    """Draw model states as stacked bars: groups along the axis, a bar per series in each group, parts in each bar.

    Args:
        states: bytes by group, series and part, such as
            ``{"stage 1": {"predicted": {"parameters": ..., "gradients": ..., "optimizer": ...}, "measured": ...}}``.
            Only the keys of :data:`PARTS` are drawn. A bar with none of them shows its ``total`` in grey.
        title: the finding.
        alt: the figure in words.
        y_label: name of the values; the unit is added.
    """
    names = list(dict.fromkeys(name for series in states.values() for name in series))
    width = 0.8 / len(names)
    with styled_axes(title, alt, size=(7.0, 3.8), grid="y") as (axes, drawn):
        for group, series in enumerate(states.values()):
            for index, name in enumerate(names):
                if name not in series:
                    continue
                at = group + (index - (len(names) - 1) / 2) * width
                bottom = 0.0
                for part, color in _parts(series[name]).items():
                    height = series[name][part] / 2**20
                    # The first series is the plain one; others are hatched, so that colour is not the only mark.
                    axes.bar(at, height, width * 0.9, bottom=bottom, color=color, hatch=_HATCHES[index % 3],
                             edgecolor=_HATCH_INK, linewidth=0)  # fmt: skip
                    bottom += height
                axes.annotate(format_short(bottom), (at, bottom), xytext=(0, 3), textcoords="offset points",
                              ha="center", fontsize=8)  # fmt: skip
        axes.set_ylabel(f"{y_label} (MiB)")
        axes.margins(y=0.12)
        axes.set_xticks(range(len(states)), list(states))
        axes.tick_params(axis="x", length=0)
        used = {
            part: color for bars in states.values() for each in bars.values() for part, color in _parts(each).items()
        }
        _legend(axes, {part: color for part, color in (PARTS | _TOTAL).items() if part in used}, names)
    return drawn[0]


_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_HATCHES = ("", "////", "....")
_HATCH_INK = "#ffffff99"


def _parts(bar: Mapping[str, float]) -> dict[str, str]:
    """Return the parts of one bar with their colours."""
    return {part: color for part, color in PARTS.items() if part in bar} or _TOTAL


def _legend(axes: Any, colors: Mapping[str, str], names: Sequence[str]) -> None:
    """Draw a legend below the axes: a row for the parts' colours, and one for the hatches of several series."""
    from matplotlib.patches import Patch

    parts = [Patch(color=color, label="not split" if part in _TOTAL else part) for part, color in colors.items()]
    series = [
        Patch(facecolor=INK, edgecolor=_HATCH_INK, hatch=_HATCHES[index % 3], linewidth=0, label=name)
        for index, name in enumerate(names if len(names) > 1 else ())
    ]
    # Matplotlib fills a legend column by column.
    blank = Patch(alpha=0, label=" ")
    columns = zip_longest(parts, series, fillvalue=blank) if series else [(part,) for part in parts]
    handles = [handle for column in columns for handle in column]
    axes.figure.legend(
        handles=handles, frameon=False, ncols=len(handles) // (2 if series else 1), loc="outside lower center"
    )


def stacked_bars(
    values: Mapping[str, Mapping[str, float]], *, title: str, alt: str, unit: str, groups: Sequence[str] = ()
) -> Figure:
    """Draw a horizontal bar per label, stacked from parts, with its total.

    Args:
        values: numbers by the bar's label, drawn from top to bottom, and by part.
        title: the finding.
        alt: the figure in words.
        unit: name and unit of the numbers, for the axis.
        groups: prefixes of labels: there is a gap between bars with different prefixes.
    """
    parts = list(dict.fromkeys(part for bar in values.values() for part in bar))
    gaps = [next((i for i, group in enumerate(groups) if label.startswith(group)), 0) for label in values]
    places = [index + 0.6 * gap for index, gap in enumerate(gaps)]
    height = 1.4 + 0.3 * (places[-1] + 1) + 0.2 * math.ceil(len(parts) / 2)
    with styled_axes(title, alt, size=(7.0, height), grid="x") as (axes, drawn):
        totals = [0.0] * len(values)
        for index, part in enumerate(parts):
            widths = [bar.get(part, 0.0) for bar in values.values()]
            axes.barh(places, widths, left=totals, height=0.72, color=PALETTE[index % len(PALETTE)], label=part,
                      hatch=_HATCHES[index % 3], edgecolor=_HATCH_INK, linewidth=0)  # fmt: skip
            totals = [total + width for total, width in zip(totals, widths, strict=True)]
        for place, total in zip(places, totals, strict=True):
            axes.annotate(format_short(total), (total, place), xytext=(4, 0), textcoords="offset points", va="center",
                          fontsize=8)  # fmt: skip
        axes.set_yticks(places, list(values))
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.1)
        axes.figure.legend(frameon=False, ncols=min(len(parts), 2), loc="outside lower center")
    return drawn[0]


def shards(panels: Mapping[str, Sequence[Sequence[int]]], *, title: str, alt: str) -> Figure:
    """Draw which rank's file holds which part of a matrix: a panel per checkpoint, a colour and a number per rank.

    Args:
        panels: for each heading, a grid over the matrix that names the rank of each cell.
        title: the finding.
        alt: the figure in words.
    """
    with styled_axes(title, alt, size=(7.0, 3.2)) as (axes, drawn):
        axes.set_axis_off()
        for index, (heading, grid) in enumerate(panels.items()):
            each = 1 / len(panels)
            panel = axes.inset_axes((index * each + 0.01, 0.0, each - 0.02, 0.84))
            panel.set_title(heading, fontsize=8.5, pad=4)
            panel.set(xlim=(0, len(grid[0])), ylim=(len(grid), 0), xticks=[], yticks=[])
            panel.spines[:].set_visible(True)
            for rank, cells in _cells(grid).items():
                rows, columns = zip(*cells, strict=True)
                for row, column in cells:
                    panel.barh(row + 0.5, 1, left=column, height=1.03, color=PALETTE[rank % len(PALETTE)])
                middle = sum(columns) / len(cells) + 0.5, sum(rows) / len(cells) + 0.5
                panel.text(*middle, f"rank {rank}", color="#ffffff", ha="center", va="center", fontsize=9,
                           fontweight="bold")  # fmt: skip
    return drawn[0]


def _cells(grid: Sequence[Sequence[int]]) -> dict[int, list[tuple[int, int]]]:
    """Return the cells of a grid, (row, column), by their value."""
    found: dict[int, list[tuple[int, int]]] = {}
    for row, held in enumerate(grid):
        for column, rank in enumerate(held):
            found.setdefault(rank, []).append((row, column))
    return found


@contextmanager
def styled_axes(
    title: str, alt: str, *, size: tuple[float, float], grid: str = "both"
) -> Iterator[tuple[Any, list[Figure]]]:
    """Yield axes in the course's style, and a list that holds the drawn figure when the block ends."""
    if not alt.strip() or not title.strip():
        raise ValueError("A figure needs a title that states the finding, and an alt text that describes the picture.")
    # Do not use pyplot: it keeps global state, and may pick a backend that needs a screen.
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    # A user's own matplotlibrc must not change the course's figures.
    with style.context(["default", STYLE]):
        canvas = Canvas(figsize=size, dpi=_DPI, layout="constrained")
        axes = canvas.add_subplot()
        axes.set_title(textwrap.fill(title, 62), loc="left", fontweight="bold", pad=10)
        axes.grid(axis=grid, color=INK, alpha=0.25, linewidth=0.8)  # type: ignore[arg-type]
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        drawn: list[Figure] = []
        yield axes, drawn
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", metadata={"Software": None})
        drawn.append(Figure(buffer.getvalue(), title, alt, int(size[0] * _DPI / 2), int(size[1] * _DPI / 2)))


STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlecolor": INK,
    "legend.labelcolor": INK,
    "hatch.linewidth": 1.0,
    "svg.fonttype": "path",
    "svg.hashsalt": "tutorial_lib",
}
"""Settings for all drawings. DejaVu Sans ships with the drawing library, so it is the same everywhere."""


def _label_log_scale(axis: Any) -> None:
    """Label powers of ten, and in a short range also twice and five times as much."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    if high < 3000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: format_short(value))
    axis.set_minor_formatter("")


def _whole_numbers(axis: Any, values: Sequence[float]) -> None:
    """Put ticks at whole numbers, with commas, if the values are whole: there is no step 2.5."""
    from matplotlib.ticker import MaxNLocator

    if all(float(v).is_integer() for v in values):
        axis.set_major_locator(MaxNLocator(integer=True))
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
