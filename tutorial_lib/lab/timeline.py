"""Step timeline: when a rank gathers, computes and reduces, and what it holds, read from a trace of one FSDP2 step.

``torch.profiler`` records FSDP2's own marks, such as ``FSDP::all_gather (transformer.h.0)``. A unit computes from the
end of its ``pre_forward`` mark to the start of ``post_forward``, and likewise in backward. With ``profile_memory``, the
profiler records every allocation, too.

Source of the marks: ``torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py`` and ``_fsdp_state.py``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.lab.figures import BLUE, GREEN, INK, ORANGE, PURPLE, Figure, styled_axes

LANES = {"all-gather": BLUE, "compute": GREEN, "reduce-scatter": ORANGE}
"""Kinds of work of a rank, with their colours."""

_MARK = re.compile(r"FSDP::(?P<what>[\w ]+?)(?: \((?P<unit>[\w.]*)\))?$")


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work of a rank.

    Args:
        lane: one of :data:`LANES`.
        unit: the module that is gathered, computed or reduced; empty for the root, ``loss`` for the time between
            forward and backward of the layers.
        start: milliseconds since the start of the step.
        end: milliseconds since the start of the step.
    """

    lane: str
    unit: str
    start: float
    end: float


def read_trace(path: str | Path) -> list[Span]:
    """Read the spans from a trace that ``export_chrome_trace`` wrote, in the order in which they started.

    Raises:
        ValueError: the trace has none of FSDP2's marks.
    """
    marks = _marks(_events(path), path)
    began = marks[0][0]
    spans = []
    for number, (start, end, what, unit) in enumerate(marks):
        lane = {"all_gather": "all-gather", "post_backward_reduce": "reduce-scatter"}.get(what)
        if lane:
            spans.append(Span(lane, unit, start - began, end - began))
        after = {"pre_forward": "post_forward", "pre_backward": "post_backward_accumulate"}.get(what)
        if after and unit:
            stop = next((mark[0] for mark in marks[number:] if mark[2:] == (after, unit)), end)
            spans.append(Span("compute", unit, end - began, stop - began))
    forward = max((mark[1] for mark in marks if mark[2] == "post_forward" and mark[3]), default=None)
    backward = next((mark[0] for mark in marks if mark[2:] == ("pre_backward", "")), None)
    if forward is not None and backward is not None:
        spans.append(Span("compute", "loss", forward - began, backward - began))
    return sorted(spans, key=lambda span: span.start)


def read_memory(path: str | Path) -> list[tuple[float, int]]:
    """Read the memory that a rank added to what it held at the start of the step, as pairs of milliseconds and bytes.

    Raises:
        ValueError: the trace has none of FSDP2's marks, or was recorded without ``profile_memory``.
    """
    events = _events(path)
    began = _marks(events, path)[0][0]
    changes = sorted((e["ts"] / 1e3 - began, e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    if not changes:
        raise ValueError(f"{path} has no allocations. Record it with profile(profile_memory=True).")
    times, sizes = zip(*changes, strict=True)
    return list(zip(times, itertools.accumulate(sizes), strict=True))


def draw(spans: Sequence[Span], memory: Sequence[tuple[float, int]] = (), *, title: str, alt: str) -> Figure:
    """Draw a lane for each kind of work, with the last part of a unit's name over each span, and the memory below.

    Args:
        spans: from :func:`read_trace`.
        memory: from :func:`read_memory`; without it there are only the lanes.
        title: the finding.
        alt: description of the picture.
    """
    with styled_axes(title, alt, size=(7.2, 4.4 if memory else 3.0), grid="x") as (axes, drawn):
        for height, (lane, color) in enumerate(LANES.items()):
            for span in spans:
                if span.lane == lane:
                    length = span.end - span.start
                    axes.barh(-height, length, left=span.start, height=0.5, color=color, edgecolor=INK, linewidth=0.8)
        for lane_spans in ([span for span in spans if span.lane == lane] for lane in LANES):
            _label(axes, lane_spans)
        axes.set_yticks([-height for height in range(len(LANES))], list(LANES))
        bottom = 0.6 - len(LANES)
        if memory:
            bottom = _draw_memory(axes, memory)
        axes.set_ylim(bottom, 0.95)
        for loss in (span for span in spans if span.unit == "loss"):
            axes.axvline(loss.end, color=INK, linewidth=1, linestyle=":")
            axes.annotate("backward starts", (loss.end, 0.72), xytext=(4, 0), textcoords="offset points", fontsize=9)
        axes.set_xlabel("time in the step (ms)")
    return drawn[0]


def _draw_memory(axes: Any, memory: Sequence[tuple[float, int]]) -> float:
    """Draw the memory as an area under the lanes, mark its peak, and return the y value of its lower edge."""
    lanes, height = len(LANES), 1.4
    base, peak = 0.4 - lanes - height, max(held for _, held in memory)
    times, held = zip(*memory, strict=True)
    levels = [base + height * bytes_held / peak for bytes_held in held]
    axes.fill_between(times, base, levels, step="post", color=PURPLE, alpha=0.6, linewidth=0)
    axes.step(times, levels, where="post", color=PURPLE, linewidth=1)  # shows a peak that is shorter than a pixel
    at = times[held.index(peak)]
    axes.plot(at, base + height, "o", color=INK, markersize=8, fillstyle="none", markeredgewidth=1.8)
    axes.annotate(f"peak: {peak / 1e6:.0f} MB", (at, base + height), xytext=(-9, 0), textcoords="offset points",
                  ha="right", va="center")  # fmt: skip
    axes.set_yticks([-lane for lane in range(lanes)] + [base + height / 2], [*LANES, "memory beyond\nthe start"])
    return base


def _label(axes: Any, lane: Sequence[Span]) -> None:
    """Write each unit's name over its span, but the root's under it, because neighbours may be close."""
    for span in lane:
        name, y = span.unit.rpartition(".")[2] or "root", -list(LANES).index(span.lane)
        under = not span.unit
        axes.text((span.start + span.end) / 2, y - 0.28 if under else y + 0.27, name, ha="center",
                  va="top" if under else "bottom", fontsize=8)  # fmt: skip


def _events(path: str | Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(path).read_text())["traceEvents"]
    return found


def _marks(events: Sequence[dict[str, Any]], path: str | Path) -> list[tuple[float, float, str, str]]:
    """Return FSDP2's marks in order: start and end in milliseconds, what the rank does, and the unit's name."""
    marks = []
    for event in events:
        found = _MARK.match(str(event.get("name", "")))
        if event.get("ph") == "X" and found:
            marks.append((event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3, found["what"], found["unit"] or ""))
    if not marks:
        raise ValueError(f"{path} has none of FSDP2's marks. Record a step of a model that fully_shard has sharded.")
    return sorted(marks)
