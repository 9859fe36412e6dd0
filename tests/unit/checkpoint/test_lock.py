"""Locks, which allow only one start of a run at a time."""

import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest

from tests.support.torch_runs import ALONE, config
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import lock
from tutorial_lib.checkpoint.lock import launch_lock
from tutorial_lib.cli import main
from tutorial_lib.config import ConfigError
from tutorial_lib.lab.lesson import remove_runs
from tutorial_lib.records import RunDirectory


def hold_lock(run, which, held):
    with launch_lock(run) if which == "launch" else lock.training_lock(run, ALONE):
        held.set()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """Return a function that starts a process which holds one of a run's locks. A fork has everything imported."""
    fork, started = multiprocessing.get_context("fork"), []

    def hold(which):
        run, held = RunDirectory(tmp_path / "run"), fork.Event()
        run.create()
        process = fork.Process(target=hold_lock, args=(run, which, held))
        process.start()
        started.append(process)
        assert held.wait(60)
        return process

    yield hold
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("which", ["launch", "training"])
def test_a_second_start_is_refused_with_the_running_process(holder, tmp_path, capsys, which):
    process = holder(which)
    (tmp_path / "run" / ".stop-requested").write_text("of the first")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    given = ["--engine", "torch", "--dp", "1", "--launcher", "none", "--steps", "1", "--storage", str(tmp_path)]
    began = time.monotonic()
    assert main(["train", *given]) == 2
    shown = capsys.readouterr().err
    assert (
        f"Run 'run' in {tmp_path} is already running: process {process.pid} on {os.uname().nodename}, since 20" in shown
    )
    assert "give this run another name" in shown
    assert time.monotonic() - began < checkpoint.lock.PREDECESSOR_SECONDS
    after = sorted(
        (path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*") if ".lock" not in path.name
    )
    assert after == [each for each in before if ".lock" not in each[0].name and each[0] != tmp_path]


@pytest.mark.parametrize("which", ["launch", "training"])
def test_a_killed_process_holds_no_lock(holder, tmp_path, which):
    process = holder(which)
    process.kill()
    process.join()
    assert launch.run(config(tmp_path, name="run", steps=1)).result["status"] == "completed"


@pytest.mark.parametrize("which", ["launch", "training"])
def test_a_lesson_removes_no_run_that_is_running(holder, tmp_path, which):
    remove_runs(str(tmp_path))
    process = holder(which)
    for name in ("run", "another"):
        RunDirectory(tmp_path / name).create()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot be emptied: run is still running in it\. Wait until it ends"):
        remove_runs(str(tmp_path))
    assert (tmp_path / "another").is_dir()
    process.kill()
    process.join()
    remove_runs(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lesson", ".reader.lock"]


def test_a_refused_manager_leaves_the_run_free(tmp_path):
    """A kernel keeps a cell's last error, and with it everything that the failed call held."""
    settings = config(tmp_path, name="run", steps=None, epochs=1, warmup_steps=9)
    loader = SimpleNamespace(num_steps=4, last_step=4, summary=SimpleNamespace(sha256="of the rows"))
    with pytest.raises(ConfigError) as kept:
        checkpoint.CheckpointManager(settings, None, loader, ALONE)
    lock.check_free(RunDirectory(settings.directory))
    assert kept.match("warmup_steps=9 is longer than the whole run of 4")
