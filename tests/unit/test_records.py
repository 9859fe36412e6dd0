"""Records of a run, and the guarantees for readers while they are written."""

import json
import subprocess
import sys

import pytest

from tutorial_lib.config import ConfigError
from tutorial_lib.records import RunDirectory, typical_rows, write_atomically


def test_nothing_exists_before_it_is_created(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert run.rows() == []
    assert run.first_error() is None
    assert not run.path.exists()
    with pytest.raises(FileNotFoundError):
        run.result()


def test_rows_are_read_in_order_and_exactly(run):
    rows = [{"step": step, "loss": 0.1 + step / 3} for step in range(1, 5)]
    for row in rows:
        run.append(row)
    assert run.rows() == rows


@pytest.mark.parametrize(
    ("measured", "result", "typical"),
    [
        (None, {}, [2, 3, 4, 5, 6, 7, 8]),
        (3, {}, [2, 4, 5, 6, 7, 8]),
        (8, {"resumed_from": 6}, [2, 4, 5, 6]),
        (8, {"resumed_from": 5, "restarts": [{"from_step": 4}, {"from_step": 5}]}, [2, 4]),
    ],
)
def test_steps_that_allocate_or_are_measured_are_not_typical_in_any_start(measured, result, typical):
    result |= {"ranks": [{"measured": measured and {"step": measured}}]}
    rows = typical_rows(result, [{"step": step} for step in range(1, 9)])
    assert [row["step"] for row in rows] == typical


def test_a_row_that_is_still_being_written_is_left_out(run):
    run.append({"step": 1})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.rows() == [{"step": 1}]


def test_a_resume_drops_later_rows_and_a_torn_one(run):
    for step in range(1, 6):
        run.append({"step": step})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 6')
    run.keep_rows_until(3)
    run.append({"step": 4, "again": True})
    assert run.rows() == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


def test_a_resume_keeps_one_row_of_each_step(run):
    for step in (1, 2, 1, 2, 3):
        run.append({"step": step})
    run.keep_rows_until(3)
    assert run.rows() == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("line", ["garbage", "", "3", '{"step": 1, "lo', '{"stap": 2}'])
def test_a_line_that_is_no_row_is_named(run, line):
    run.append({"step": 1})
    with run.metrics_file.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2 is not a row of metrics: .* Remove it"):
        run.rows()


def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"], "nothing half-written is left"


def test_an_atomic_write_leaves_nothing_else(tmp_path):
    write_atomically(tmp_path / "a.json", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_first_failure_is_reported_not_its_consequences(run):
    for rank, message in ((1, "the cause"), (0, "peer closed the connection")):
        try:
            raise ValueError(message)
        except ValueError as error:
            run.write_error(rank, error)
    found = run.first_error()
    assert (found["rank"], found["type"], found["message"]) == (1, "ValueError", "the cause")
    assert "raise ValueError(message)\nValueError: the cause" in found["traceback"]


def test_an_error_that_reports_a_lost_rank_is_a_consequence_whatever_the_clocks_say(run):
    run.write_error(0, RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    run.write_error(1, ValueError("the cause"))
    assert [record["rank"] for record in run.errors()] == [0, 1]
    assert run.first_error()["message"] == "the cause"


def test_a_new_start_clears_only_errors_and_stop_requests(run):
    run.append({"step": 1})
    run.write_error(0, ValueError("old"))
    run.stop_file.write_text("stop")
    run.log_file(0).write_text("kept")
    run.clear_requests()
    assert run.first_error() is None
    assert not run.stop_file.exists()
    assert run.rows() == [{"step": 1}]
    assert run.log_file(0).read_text() == "kept"


def test_rows_are_json_for_others(run):
    run.append({"step": 1, "loss": 2.5, "epoch": 0})
    assert [json.loads(line) for line in run.metrics_file.read_text().splitlines()] == run.rows()


def test_reading_records_and_configurations_imports_nothing_heavy():
    heavy = ("torch", "ray", "transformers", "numpy")
    loaded = f"import sys, tutorial_lib.records; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "[]\n"
