"""Progress lines of a matrix: the row, its step, and an estimate for the rest."""

from __future__ import annotations

import io

from tests.support.bench_records import done
from tutorial_lib.bench.progress import MatrixProgress
from tutorial_lib.bench.record import KILLED, RowRecord
from tutorial_lib.config import Config


def test_a_log_has_a_line_for_each_begin_and_end():
    file = io.StringIO()
    progress = MatrixProgress(file)
    progress.plan(["a", "b", "c"])
    assert progress.seconds_left() is None
    progress.begin("a", 8)
    progress.on_rows([{"step": 3}])
    assert progress.line().startswith("row 1 of 3, a: step 3 of 8, 0 s")
    progress.end(done("a"))
    progress.begin("b", 8)
    progress.end(RowRecord("b", KILLED, "Rank 0 ended with exit code -9"))
    progress.close()
    lines = file.getvalue().splitlines()
    assert [line.split(": ")[1].split(",")[0].split(" after")[0] for line in lines] == [
        "starting processes", "done", "starting processes", "killed",
    ]  # fmt: skip
    assert "10 samples/s" in lines[1] and lines[3].count("Rank 0 ended with exit code -9") == 1


def test_the_time_left_follows_the_rows_before(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = MatrixProgress(io.StringIO())
    progress.plan(["a", "b", "c", "d"])
    for row, seconds in {"a": 20.0, "b": 4.0}.items():
        progress.begin(row, Config().run.steps)
        clock[0] += seconds
        progress.end(done(row))
    assert progress.seconds_left() == 8.0, "the first row, which waited for imports, must not count"
    progress.begin("c", Config().run.steps)
    clock[0] += 3
    assert progress.seconds_left() == 5.0
    clock[0] += 30
    assert progress.seconds_left() == 4.0
