"""Step timeline: spans from the marks and collectives of a profiler's trace, and memory held from its allocations."""

import json
from pathlib import Path

import pytest

from tutorial_lib.lab.timeline import Span, draw, draw_steps, read_memory, read_trace


def write_trace(path: Path, marks: list[tuple[str, float, float]]) -> Path:
    """Write marks (name, start and end in ms) as ``export_chrome_trace`` does, after an event of another kind."""
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


def test_a_step_without_fsdp_is_split_at_its_collectives(tmp_path: Path) -> None:
    """A collective lasts until gloo finishes it. Gloo runs a reduce-scatter as an all-reduce, and reports it as one."""
    trace = write_trace(
        tmp_path / "trace.json",
        [
            ("backward", 10, 20),
            ("forward", 0, 10),
            ("c10d::_allgather_base_", 2, 3),
            ("gloo:all_gather", 2.5, 5),
            ("c10d::_reduce_scatter_base_", 14, 15),
            ("gloo:all_reduce", 14.5, 16),
            ("update", 20, 25),
            ("c10d::broadcast_", 21, 22),
            ("gloo:broadcast", 21, 22),
            ("c10d::allreduce_", 23, 23.5),
            ("gloo:all_reduce", 23, 24),
        ],
    )
    spans = read_trace(trace)
    assert spans == [
        Span("compute", "forward", 0, 2),
        Span("all-gather", "forward", 2, 5),
        Span("compute", "forward", 5, 10),
        Span("compute", "backward", 10, 14),
        Span("reduce-scatter", "backward", 14, 16),
        Span("compute", "backward", 16, 20),
        Span("compute", "update", 20, 23),
        Span("all-reduce", "update", 23, 24),
        Span("compute", "update", 24, 25),
    ]
    memory = [(0.0, 10), (12.0, 30)]
    one, two = (draw_steps({str(n): (spans, memory) for n in range(count)}, title="t", alt="a") for count in (1, 2))
    assert two.height == pytest.approx(2 * one.height, abs=1)


def test_collectives_that_overlap_or_outlast_their_phase_are_all_drawn(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "trace.json",
        [
            ("forward", 0, 10),
            ("c10d::_allgather_base_", 2, 2.5),
            ("gloo:all_gather", 2, 8),
            ("c10d::_allgather_base_", 3, 3.5),
            ("gloo:all_gather", 3, 5),
            ("c10d::_allgather_base_", 9, 9.5),
            ("gloo:all_gather", 9, 12),
        ],
    )
    assert read_trace(trace) == [
        Span("compute", "forward", 0, 2),
        Span("all-gather", "forward", 2, 8),
        Span("all-gather", "forward", 3, 5),
        Span("compute", "forward", 8, 9),
        Span("all-gather", "forward", 9, 10),
    ]


def test_a_trace_of_another_backend_is_refused(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.json", [("forward", 0, 10), ("c10d::allreduce_", 2, 3)])
    with pytest.raises(ValueError, match="1 calls of collectives, of which gloo finished 0"):
        read_trace(trace)


def test_collectives_of_single_numbers_are_left_out(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "trace.json", [("forward", 0, 10), ("c10d::allreduce_", 2, 3), ("gloo:all_reduce", 2, 4)]
    )
    content = trace.read_text().replace('"name": "c10d', '"args": {"Input Dims": [[[]], []]}, "name": "c10d')
    trace.write_text(content)
    assert read_trace(trace) == [Span("compute", "forward", 0, 10)]


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


def test_a_trace_without_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of FSDP2's marks, and no record_function\('forward'\)"):
        read_trace(write_trace(tmp_path / "trace.json", [("aten::mm", 0, 1)]))
