"""Step timeline: FSDP2's marks in a profiler's trace become spans, and allocations become the memory held."""

import json
from pathlib import Path

import pytest

from tutorial_lib.lab.timeline import LANES, Span, draw, read_memory, read_trace


def write_trace(path: Path, marks: list[tuple[str, float, float]]) -> Path:
    """Write marks (name, start and end in ms) as ``export_chrome_trace`` does, between events of other kinds."""
    events = [{"ph": "X", "name": name, "ts": 1e6 + 1e3 * a, "dur": 1e3 * (b - a)} for name, a, b in marks]
    path.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}))
    return path


def test_a_step_of_one_layer(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "trace.json",
        [
            ("FSDP::all_gather", 0, 1),
            ("FSDP::pre_forward (h.0)", 1, 3),
            ("FSDP::all_gather (h.0)", 2, 3),
            ("FSDP::post_forward (h.0)", 7, 8),
            ("FSDP::pre_backward", 10, 12),
            ("FSDP::all_gather (h.0)", 11, 12),
            ("FSDP::pre_backward (h.0)", 12, 13),
            ("aten::mm", 13, 14),
            ("FSDP::post_backward_accumulate (h.0)", 20, 21),
            ("FSDP::post_backward_reduce (h.0)", 21, 22),
            ("FSDP::post_backward_reduce", 23, 24),
        ],
    )
    assert read_trace(trace) == [
        Span("all-gather", "", 0, 1),
        Span("all-gather", "h.0", 2, 3),
        Span("compute", "h.0", 3, 7),
        Span("compute", "loss", 8, 10),
        Span("all-gather", "h.0", 11, 12),
        Span("compute", "h.0", 13, 20),
        Span("reduce-scatter", "h.0", 21, 22),
        Span("reduce-scatter", "", 23, 24),
    ]
    assert draw(read_trace(trace), title="One step", alt="Three lanes.").alt == "Three lanes."
    assert list(LANES) == ["all-gather", "compute", "reduce-scatter"]


def test_memory_is_what_the_allocations_add_up_to(tmp_path: Path) -> None:
    """Events of a trace are in no particular order, and an allocation may lie before the first mark."""
    trace = write_trace(tmp_path / "trace.json", [("FSDP::all_gather (h.0)", 0, 1)])
    events = json.loads(trace.read_text())["traceEvents"]
    changes = {2.0: 30, -1.0: 8, 3.0: -30, 1.0: 70}
    events += [{"ph": "i", "name": "[memory]", "ts": 1e6 + 1e3 * t, "args": {"Bytes": b}} for t, b in changes.items()]
    trace.write_text(json.dumps({"traceEvents": events}))
    assert read_memory(trace) == [(-1.0, 8), (1.0, 78), (2.0, 108), (3.0, 78)]
    assert draw(read_trace(trace), read_memory(trace), title="One step", alt="Lanes, and memory.").height > 200


def test_a_trace_without_allocations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="profile_memory=True"):
        read_memory(write_trace(tmp_path / "trace.json", [("FSDP::all_gather (h.0)", 0, 1)]))


def test_a_trace_without_fsdp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of FSDP2's marks"):
        read_trace(write_trace(tmp_path / "trace.json", [("aten::mm", 0, 1)]))
