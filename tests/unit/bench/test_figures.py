"""Figures of a matrix: the ones that are drawn, and the ones left out for lack of measurements."""

from __future__ import annotations

import pytest

from tests.support.bench_records import done
from tutorial_lib.bench import figures
from tutorial_lib.bench.record import RowRecord
from tutorial_lib.measure.memory_log import MIB, MemorySummary
from tutorial_lib.measure.memory_sampler import sample_memory
from tutorial_lib.theory.memory import ModelStates


@pytest.fixture
def log(tmp_path):
    with sample_memory(tmp_path / "memory.jsonl", interval=0.01) as path:
        pass
    return path


def test_every_figure_is_written_with_its_description(tmp_path, log):
    rows = [done("stage-1"), done("stage-2", samples_per_second=20.0), RowRecord("stage-3")]
    written = figures.write("zero-stages", rows, dict.fromkeys(("stage-1", "stage-2", "stage-3"), log), tmp_path)
    assert [path.name for path in written] == ["states.png", "memory.png", "speed.png", "timeline.png"]
    words = {path.stem: path.with_suffix(".txt").read_text() for path in written}
    assert "stage-2 is the fastest" in words["speed"] and "stage-1: 10 samples per second" in words["speed"]
    assert "predicted 160.00 MiB, measured 160.00 MiB" in words["states"] and "to within 0.01 %" in words["states"]
    assert "process tree" in words["memory"] and "stage-3" not in "".join(words.values())


def test_a_matrix_without_a_finished_row_has_no_figures(tmp_path):
    assert figures.write("zero-stages", [RowRecord("a")], {"a": tmp_path / "memory.jsonl"}, tmp_path) == []


def test_on_gpus_the_peak_is_shown_beside_one_ranks_states_on_its_gpu():
    gpu, states = MemorySummary("GPU", 2048 * MIB, 2000.0 * MIB, (), 3), (ModelStates(40 * MIB, 0, 0),) * 2
    drawn = figures.draw_peaks([done("a", gpu=gpu, predicted_device_states=states)])
    assert drawn is not None and drawn.title.startswith("Peak of the GPU") and "a: 2,048 MiB" in drawn.alt


def test_an_error_of_the_prediction_is_in_the_title():
    drawn = figures.draw_states([done("a", states=(ModelStates(40 * MIB, 40 * MIB, 88 * MIB),))])
    assert drawn is not None and "to within 5 %" in drawn.title
