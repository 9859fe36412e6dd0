"""Records of a run, and the guarantees for readers while they are written."""

import json
import subprocess
import sys

import pytest

from tutorial_lib.config import ConfigError
from tutorial_lib.lab.lesson import remove_runs
from tutorial_lib.records import RunDirectory, write_atomically


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create()
    return run


def test_nothing_exists_before_it_is_created(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert run.rows() == []
    assert run.first_error() is None
    assert not run.path.exists()
    with pytest.raises(FileNotFoundError):
        run.result()


def test_rows_come_back_in_order_and_exactly(run):
    rows = [{"step": step, "loss": 0.1 + step / 3} for step in range(1, 5)]
    for row in rows:
        run.append(row)
    assert run.rows() == rows


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


def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


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


def test_a_new_start_forgets_errors_and_stop_requests_alone(run):
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


def test_reading_records_imports_nothing_heavy():
    loaded = (
        "import sys, tutorial_lib.records; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "[]\n"


def a_run(storage, name):
    run = RunDirectory(storage / name)
    run.create()
    run.path.joinpath("config.json").write_text("{}")


def test_a_lesson_removes_the_runs_of_its_own_directory_alone(tmp_path):
    storage = tmp_path / "runs" / "lesson"
    remove_runs(str(storage))
    a_run(storage, "one")
    a_run(storage, "own-loop")
    (storage / "own-loop" / "config.json").rename(storage / "own-loop" / ".lock")  # it writes no config.json
    (storage / "note.json").write_text("")
    (storage / "mine" / "checkpoints").mkdir(parents=True)
    remove_runs(str(storage))
    assert sorted(path.name for path in storage.iterdir()) == [".lesson", ".reader.lock", "mine", "note.json"]


def test_a_second_reader_of_the_same_lesson_is_told_of_the_first(tmp_path):
    """Two kernels with one STORAGE: the second must not remove the runs that the first is about to use."""
    storage = tmp_path / "lesson"
    program = (
        "import sys; from tutorial_lib.lab.lesson import remove_runs\n"
        "remove_runs(sys.argv[1]); print('mine', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(storage)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "mine\n"
        a_run(storage, "of-the-first")
        with pytest.raises(ConfigError, match=rf"in use by process {first.pid} on .* since \d\d:\d\d.*STORAGE here"):
            remove_runs(str(storage))
        assert (storage / "of-the-first").is_dir()
        first.stdin.close()
    remove_runs(str(storage))
    remove_runs(str(storage))  # the same reader, who runs the cell again
    assert not (storage / "of-the-first").exists()


def test_runs_in_a_directory_that_no_lesson_made_stay(tmp_path):
    a_run(tmp_path, "somebodys")
    with pytest.raises(ConfigError, match=r"was not made by a lesson.*create the empty file"):
        remove_runs(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["somebodys"]
    (tmp_path / ".lesson").write_text("")
    remove_runs(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lesson", ".reader.lock"]
