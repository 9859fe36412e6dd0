"""Step timeline: when a rank gathers, computes and reduces, and what it holds, read from a trace of one step.

``torch.profiler`` records FSDP2's own marks, such as ``FSDP::all_gather (transformer.h.0)``. A unit computes from the
end of its ``pre_forward`` mark to the start of ``post_forward``, and likewise in backward. DeepSpeed leaves no marks,
so the loop marks the phases of its step with ``record_function``, and the profiler records each collective. All
other time counts as computing, including waits in broadcasts, barriers and all-reduces of single numbers. With
``profile_memory``, the profiler records every allocation, too.

Source of the marks: ``torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py`` and ``_fsdp_state.py``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.lab.figures import BLUE, GREEN, INK, ORANGE, PURPLE, Figure, styled_axes

LANES = {"all-gather": (0, BLUE), "compute": (1, GREEN), "reduce-scatter": (2, ORANGE), "all-reduce": (2, ORANGE)}
"""Kinds of work of a rank, with their row in a picture and their colour."""

PHASES = ("forward", "backward", "update")
"""Names that a training loop gives to the parts of its step, see ``notebooks/scripts/trace_zero.py``."""

_MARK = re.compile(r"FSDP::(?P<what>[\w ]+?)(?: \((?P<unit>[\w.]*)\))?$")
_COLLECTIVES = {
    "c10d::allreduce_": "all-reduce",
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
}
_ROWS, _MEMORY_HEIGHT, _PANEL_HEIGHT = 3, 1.4, 5.6


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work of a rank.

    Args:
        lane: one of :data:`LANES`.
        unit: the module that is gathered, computed or reduced; empty for the root, ``loss`` for the time between
            forward and backward of the layers. Without FSDP2, one of :data:`PHASES`.
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
        ValueError: the trace has neither FSDP2's marks nor those of a step's phases, or its collectives are not gloo's.
    """
    events = _events(path)
    began = _start(events, path)
    spans = _spans_of_units(_marks(events)) or _spans_of_phases(events, path)
    return [Span(s.lane, s.unit, s.start - began, s.end - began) for s in sorted(spans, key=lambda s: s.start)]


def read_memory(path: str | Path) -> list[tuple[float, int]]:
    """Read how a rank's memory grew during the step: pairs of milliseconds and bytes, both since its start.

    Raises:
        ValueError: the trace has neither FSDP2's marks nor those of a step's phases, or was recorded without
            ``profile_memory``.
    """
    events = _events(path)
    began = _start(events, path)
    changes = sorted((e["ts"] / 1e3 - began, e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    if not changes:
        raise ValueError(f"{path} has no allocations. Record it with profile(profile_memory=True).")
    times, sizes = zip(*changes, strict=True)
    return list(zip(times, itertools.accumulate(sizes), strict=True))


Step = tuple[Sequence[Span], Sequence[tuple[float, int]]]
"""Spans and memory of one step."""


def read_step(path: str | Path) -> Step:
    """Read the spans and the memory of a step from a trace: see :func:`read_trace` and :func:`read_memory`."""
    return read_trace(path), read_memory(path)


def draw(spans: Sequence[Span], memory: Sequence[tuple[float, int]] = (), *, title: str, alt: str) -> Figure:
    """Draw a lane for each kind of work, with the last part of a unit's name over each span, and the memory below.

    Args:
        spans: from :func:`read_trace`.
        memory: from :func:`read_memory`; without it there are only the lanes.
        title: the finding.
        alt: description of the picture.
    """
    return draw_steps({"": (spans, memory)}, title=title, alt=alt, inches=4.4 if memory else 3.0)


def draw_steps(steps: Mapping[str, Step], *, title: str, alt: str, inches: float = 2.4) -> Figure:
    """Draw steps one below the other, each as :func:`draw` does, with one time axis and one scale of memory.

    Args:
        steps: spans and memory by heading.
        title: the finding.
        alt: description of the picture.
        inches: height of each step.
    """
    peak = max((held for _, memory in steps.values() for _, held in memory), default=0)
    ticks: dict[float, str] = {}
    bottom = 0.0
    with styled_axes(title, alt, size=(7.2, inches * len(steps)), grid="x") as (axes, drawn):
        for number, (heading, (spans, memory)) in enumerate(steps.items()):
            top = -_PANEL_HEIGHT * number
            axes.text(0, top + 0.85, heading, fontweight="bold")
            ticks |= _draw_lanes(axes, top, spans)
            bottom = top + 0.6 - _ROWS
            if memory:
                bottom = top + 0.4 - _ROWS - _MEMORY_HEIGHT
                _draw_memory(axes, bottom, memory, peak)
                ticks[bottom + _MEMORY_HEIGHT / 2] = "memory that\nthe step adds"
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.set_ylim(bottom, 0.95 + 0.4 * bool("".join(steps)))
        axes.set_xlabel("time in the step (ms)")
    return drawn[0]


def _draw_lanes(axes: Any, top: float, spans: Sequence[Span]) -> dict[float, str]:
    """Draw the spans of a step below ``top``, and return the lanes' heights and names."""
    reduced = sorted({span.lane for span in spans} & {"all-reduce", "reduce-scatter"}) or ["reduce-scatter"]
    kinds = ["all-gather", "compute", *reduced]
    bottom = top - _ROWS + 0.6
    for lane in kinds:
        row, color = LANES[lane]
        found = [span for span in spans if span.lane == lane]
        for span in found:
            axes.barh(top - row, span.end - span.start, left=span.start, height=0.5, color=color,
                      edgecolor=INK, linewidth=0.3 if span.unit in PHASES else 0.8)  # fmt: skip
        _label(axes, top - row, found)
    for phase in PHASES[1:]:
        if begin := [span.start for span in spans if span.unit == phase]:
            axes.vlines(min(begin), bottom, top + 0.7, color=INK, linewidth=1, linestyle=":")
    for loss in (span for span in spans if span.unit == "loss"):
        axes.vlines(loss.end, bottom - _MEMORY_HEIGHT, top + 0.95, color=INK, linewidth=1, linestyle=":")
        axes.annotate("backward starts", (loss.end, 0.72), xytext=(4, 0), textcoords="offset points", fontsize=9)
    return {top: "all-gather", top - 1: "compute", top - 2: ",\n".join(reduced)}


def _draw_memory(axes: Any, base: float, memory: Sequence[tuple[float, int]], scale: int) -> None:
    """Draw the memory as an area that starts at the height ``base``, and mark its peak."""
    times, held = zip(*memory, strict=True)
    levels = [base + _MEMORY_HEIGHT * bytes_held / scale for bytes_held in held]
    axes.fill_between(times, base, levels, step="post", color=PURPLE, alpha=0.6, linewidth=0)
    axes.step(times, levels, where="post", color=PURPLE, linewidth=1)  # shows a peak that is shorter than a pixel
    at = held.index(max(held))
    axes.plot(times[at], levels[at], "o", color=INK, markersize=8, fillstyle="none", markeredgewidth=1.8)
    side = "right" if times[at] > 0.3 * axes.get_xlim()[1] else "left"
    axes.annotate(f"peak: {held[at] / 1e6:.0f} MB", (times[at], levels[at]), xytext=(-9 if side == "right" else 9, 0),
                  textcoords="offset points", ha=side, va="center")  # fmt: skip


def _label(axes: Any, y: float, lane: Sequence[Span]) -> None:
    """Write each unit's name over its span, but the root's under it, because neighbours may be close.

    A phase's name stands over the phase's start.
    """
    pieces = itertools.groupby(enumerate(lane), key=lambda item: item[1].unit if item[1].unit in PHASES else item[0])
    for together in ([span for _, span in piece] for _, piece in pieces):
        first, last = together[0], together[-1]
        if first.unit in PHASES and first.lane != "compute":
            continue
        name, under = first.unit.rpartition(".")[2] or "root", not first.unit
        if first.unit in PHASES:  # beside the dotted line at the phase's start
            axes.annotate(name, (first.start, y + 0.27), xytext=(3, 0), textcoords="offset points", fontsize=8)
            continue
        axes.text((first.start + last.end) / 2, y - 0.28 if under else y + 0.27, name, ha="center",
                  va="top" if under else "bottom", fontsize=8)  # fmt: skip


def _spans_of_units(marks: Sequence[tuple[float, float, str, str]]) -> list[Span]:
    """Return the spans between FSDP2's marks."""
    spans = []
    for number, (start, end, what, unit) in enumerate(marks):
        lane = {"all_gather": "all-gather", "post_backward_reduce": "reduce-scatter"}.get(what)
        if lane:
            spans.append(Span(lane, unit, start, end))
        after = {"pre_forward": "post_forward", "pre_backward": "post_backward_accumulate"}.get(what)
        if after and unit:
            stop = next((mark[0] for mark in marks[number:] if mark[2:] == (after, unit)), end)
            spans.append(Span("compute", unit, end, stop))
    forward = max((mark[1] for mark in marks if mark[2] == "post_forward" and mark[3]), default=None)
    backward = next((mark[0] for mark in marks if mark[2:] == ("pre_backward", "")), None)
    if forward is not None and backward is not None:
        spans.append(Span("compute", "loss", forward, backward))
    return spans


def _spans_of_phases(events: Sequence[dict[str, Any]], path: str | Path) -> list[Span]:
    """Return the collectives of each phase, and count the rest of the phase as computing.

    A collective lasts until gloo, in a thread of its own, has finished it. The trace has the calls and gloo's work in
    the same order.
    """
    called = [event for event in _complete(events) if str(event["name"]).startswith("c10d::")]
    done = [event for event in _complete(events) if str(event["name"]).startswith("gloo:")]
    if len(called) != len(done):
        raise ValueError(
            f"{path} has {len(called)} calls of collectives, of which gloo finished {len(done)}. Record a step on CPUs."
        )
    carrying = [  # leave out single numbers, such as a norm
        (_COLLECTIVES[call["name"]], call["ts"] / 1e3, _end(work))
        for call, work in zip(called, done, strict=True)
        if call["name"] in _COLLECTIVES and call.get("args", {}).get("Input Dims", [None])[0] != [[]]
    ]
    spans = []
    for phase in _complete(events):
        if phase["name"] not in PHASES:
            continue
        name, began, end = phase["name"], phase["ts"] / 1e3, _end(phase)
        computes_from = began
        for lane, start, stop in carrying:
            if began <= start < end:
                if computes_from < start:
                    spans.append(Span("compute", name, computes_from, start))
                spans.append(Span(lane, name, start, min(stop, end)))
                computes_from = max(computes_from, min(stop, end))
        if computes_from < end:
            spans.append(Span("compute", name, computes_from, end))
    return spans


def _start(events: Sequence[dict[str, Any]], path: str | Path) -> float:
    """Return when a step started, in milliseconds."""
    starts = [mark[0] for mark in _marks(events)]
    starts = starts or [event["ts"] / 1e3 for event in _complete(events) if event["name"] == PHASES[0]]
    if not starts:
        raise ValueError(
            f"{path} has none of FSDP2's marks, and no record_function({PHASES[0]!r}). Record a step of a model that "
            "fully_shard has sharded, or mark the phases of your loop."
        )
    return min(starts)


def _events(path: str | Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(path).read_text())["traceEvents"]
    return found


def _complete(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events that have a duration, in the order in which they started."""
    return sorted((event for event in events if event.get("ph") == "X"), key=lambda event: event["ts"])


def _end(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"]) / 1e3


def _marks(events: Sequence[dict[str, Any]]) -> list[tuple[float, float, str, str]]:
    """Return FSDP2's marks in order: start and end in milliseconds, what the rank does, and the unit's name."""
    marks = []
    for event in events:
        found = _MARK.match(str(event.get("name", "")))
        if event.get("ph") == "X" and found:
            marks.append((event["ts"] / 1e3, _end(event), found["what"], found["unit"] or ""))
    return sorted(marks)
