"""Step timeline: when a rank gathers, computes and reduces, read from a profiler's trace of one FSDP2 step.

``torch.profiler`` records FSDP2's own marks, such as ``FSDP::all_gather (transformer.h.0)``. A unit computes between
its last mark before the computation and its first one afterwards.

Source of the marks: ``torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py`` and ``_fsdp_state.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.lab.figures import BLUE, GREEN, ORANGE, Figure, styled_axes

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
    marks = []
    for event in json.loads(Path(path).read_text())["traceEvents"]:
        found = _MARK.match(str(event.get("name", "")))
        if event.get("ph") == "X" and found:
            marks.append((event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3, found["what"], found["unit"] or ""))
    if not marks:
        raise ValueError(f"{path} has none of FSDP2's marks. Record a step of a model that fully_shard has sharded.")
    marks.sort()
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


def draw(spans: Sequence[Span], *, title: str, alt: str) -> Figure:
    """Draw a lane for each kind of work and a bar for each span, labelled with the last part of its unit's name."""
    with styled_axes(title, alt, size=(7.2, 2.6), grid="x") as (axes, drawn):
        for height, (lane, color) in enumerate(LANES.items()):
            for span in spans:
                if span.lane == lane:
                    axes.barh(-height, span.end - span.start, left=span.start, height=0.6, color=color)
                    _label(axes, span, -height)
        axes.set_yticks([-height for height in range(len(LANES))], list(LANES))
        axes.set_xlabel("time in the step (ms)")
    return drawn[0]


def _label(axes: Any, span: Span, y: float) -> None:
    name = span.unit.rpartition(".")[2] or "root"
    axes.text((span.start + span.end) / 2, y - 0.42, name, ha="center", va="top", fontsize=7)
