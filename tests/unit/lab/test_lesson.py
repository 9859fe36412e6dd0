"""Start of a lesson, which removes the runs in its own directory, and no others."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tutorial_lib.config import ConfigError
from tutorial_lib.dataloader import load_rows
from tutorial_lib.lab import lesson
from tutorial_lib.lab.lesson import remove_runs, set_visible_gpus, texts_of
from tutorial_lib.lab.scripts import torchrun
from tutorial_lib.records import RunDirectory


def a_run(storage, name):
    run = RunDirectory(storage / name)
    run.create()
    run.path.joinpath("config.json").write_text("{}")


def test_a_lesson_removes_only_runs_in_its_own_directory(tmp_path):
    storage = tmp_path / "runs" / "lesson"
    remove_runs(str(storage))
    a_run(storage, "one")
    a_run(storage, "own-loop")
    (storage / "own-loop" / "config.json").rename(storage / "own-loop" / ".lock")  # such a run has no config.json
    (storage / "note.json").write_text("")
    (storage / "mine" / "checkpoints").mkdir(parents=True)
    remove_runs(str(storage))
    assert sorted(path.name for path in storage.iterdir()) == [".lesson", ".reader.lock", "mine", "note.json"]


def test_a_cell_that_runs_again_removes_only_what_it_made(tmp_path):
    storage = tmp_path / "lesson"
    remove_runs(str(storage), "one")
    a_run(storage, "one")
    a_run(storage, "two")
    (storage / "exported").mkdir()
    (storage / "exported" / "config.json").write_text("{}")
    remove_runs(str(storage), "one", "exported", "not-yet")
    assert sorted(path.name for path in storage.iterdir()) == [".lesson", ".reader.lock", "two"]


def test_a_second_reader_of_the_same_lesson_is_refused(tmp_path):
    """If two kernels share one STORAGE, the second must not remove the runs that the first is about to use."""
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
        with pytest.raises(ConfigError, match=rf"in use by process {first.pid} on .* since 20.*STORAGE here"):
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


@pytest.mark.parametrize("before", [None, "2,3"])
def test_scripts_see_the_gpus_of_a_profile_that_trains_on_them(tmp_path, monkeypatch, before):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    monkeypatch.setattr(lesson, "VISIBLE_GPUS", before)
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.getenv('CUDA_VISIBLE_DEVICES'))")
    set_visible_gpus("cpu")
    assert torchrun(SimpleNamespace(__file__=script), 2) == ["", ""]
    set_visible_gpus("gpu")  # the reader has changed PROFILE and runs the cell again
    assert os.getenv("CUDA_VISIBLE_DEVICES") == before


def test_texts_are_read_from_the_column_text_or_another_data_set_is_asked_for():
    assert all(isinstance(text, str) for text in texts_of(load_rows("embedded/news", "train", max_examples=3)))
    with pytest.raises(ConfigError, match=r"columns .*question.*Write a DATASET .*'embedded/news'"):
        texts_of(load_rows("embedded/qa", "train", max_examples=3))
