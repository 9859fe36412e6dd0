"""Saves: a checkpoint is visible once it is complete, and any interruption leaves the previous one."""

import errno
import json
import os
import re
import resource
import shutil
import threading

import pytest

from tests.support.damaged_files import cut_short
from tests.support.late_writes import LateTrainer, LateTrainerWithoutSnapshot
from tests.support.torch_runs import assert_same, config, make_checkpoint, names, steps
from tutorial_lib import checkpoint, launch, trainer
from tutorial_lib.checkpoint import CheckpointError, directory, manifest, storage
from tutorial_lib.checkpoint.directory import clean_up_leftovers
from tutorial_lib.checkpoint.rank_writer import Writer
from tutorial_lib.checkpoint.storage import storage_failure
from tutorial_lib.engine.single import TorchEngine
from tutorial_lib.records import RunDirectory


def test_checkpoints_are_saved_every_so_many_steps_and_at_the_end(interrupted):
    names = sorted(path.name for path in interrupted.directory.checkpoints.iterdir())
    assert names == ["step-00000002", "step-00000004"]


def test_an_interrupted_save_leaves_the_checkpoint_before_it(uninterrupted, model, tmp_path, monkeypatch):
    """The interrupt also leaves a partial directory under a temporary name, and rows that are written again."""
    save, saves = TorchEngine.save, []

    def failing(self, directory, writer):
        save(self, directory, writer)
        saves.append(directory)
        if len(saves) == 2:
            raise KeyboardInterrupt

    settings = config(tmp_path, model=model, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "save", failing)
        with pytest.raises(KeyboardInterrupt):
            launch.run(settings)
    run = RunDirectory(settings.directory)
    partial, saved = sorted(path.name for path in run.checkpoints.iterdir())
    assert partial.startswith(".partial-step-00000004-") and saved == "step-00000002"
    assert checkpoint.latest(run).name == "step-00000002"
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    assert_same(launch.run(settings), uninterrupted)
    assert sorted(path.name for path in run.checkpoints.iterdir())[0] == "step-00000002"


def test_a_file_that_is_cut_short_before_the_save_ends_is_not_published(model, tmp_path, monkeypatch):
    """The SHA-256 is computed while writing, so only the size reveals that another process changed the file."""
    save = TorchEngine.save

    def truncated(self, directory, writer):
        save(self, directory, writer)
        cut_short(directory / "model.pt")

    settings = config(tmp_path, model=model, checkpoint_every=2)
    monkeypatch.setattr(TorchEngine, "save", truncated)
    with pytest.raises(CheckpointError, match=r"engine/model\.pt has \d+ bytes, but \d+ were written.*invisible"):
        launch.run(settings)
    assert checkpoint.latest(RunDirectory(settings.directory)) is None


def entries(run, step):
    files = json.loads((checkpoint.directory_of(run.directory, step) / manifest.MANIFEST).read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".pt")}


def run_with(trainer_class, settings):
    trainer.train(settings, trainer_class=trainer_class)
    run = RunDirectory(settings.directory)
    return launch.Run(settings, run.result(), run.rows())


def test_an_async_save_writes_what_a_save_at_once_would_have_written(interrupted, uninterrupted, model, tmp_path):
    settings = config(tmp_path / "late", model=model, checkpoint_every=2, async_save=True)
    newest = []

    class Watched(LateTrainer):
        def before_a_write(self, step):
            visible = checkpoint.latest(self.run)
            newest.append(visible and visible.name)

    late = run_with(Watched, settings)
    # Each save at steps 2, 4 and 6 writes three files and the description. The save at step 7 is not in the background.
    assert newest == [None] * 4 + ["step-00000002"] * 4 + ["step-00000004"] * 4, "visible before it was complete"
    assert_same(late, uninterrupted)
    for step in (2, 4):
        assert entries(late, step) == entries(interrupted, step)
        checkpoint.verify(checkpoint.directory_of(late.directory, step))
    for step in (4, 6, 7):
        shutil.rmtree(checkpoint.directory_of(late.directory, step))
    resumed = launch.run(settings)
    assert resumed.result["resumed_from"] == 2
    assert_same(resumed, uninterrupted)


def test_without_a_snapshot_the_file_holds_later_states(interrupted, model, tmp_path):
    settings = config(tmp_path / "late", model=model, checkpoint_every=2, async_save=True)
    late = run_with(LateTrainerWithoutSnapshot, settings)
    assert entries(late, 2)["engine/model.pt"] != entries(interrupted, 2)["engine/model.pt"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_checkpoint_is_reported_when_it_is_there_and_with_its_own_row(model, tmp_path, async_save):
    reported = []

    def report(path, row):
        checkpoint.verify(path)
        reported.append((path.name, row["step"]))

    settings = config(tmp_path, model=model, checkpoint_every=2, async_save=async_save)
    result = trainer.train(settings, on_checkpoint=report)
    assert reported == [(f"step-{step:08d}", step) for step in (2, 4, 6, 7)]
    run = RunDirectory(settings.directory)
    for saved, step in zip(result.saves, (2, 4, 6, 7), strict=True):
        path = checkpoint.directory_of(run, step)
        sizes = [p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name != manifest.MANIFEST]
        assert (saved["step"], saved["bytes"]) == (step, sum(sizes))
        assert 0 < saved["write_seconds"]
        assert 0 < saved["stall_seconds"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_is_an_error_and_the_checkpoint_before_it_stays(uninterrupted, model, tmp_path, async_save):
    """A limit on the size of files simulates a full disk."""
    settings = config(tmp_path, model=model, checkpoint_every=2, async_save=async_save)
    launch.run(settings.override(stop_after=2))
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, most))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/\.partial-step-00000004-\w+/engine/model\.pt'"):
            launch.run(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert checkpoint.latest(RunDirectory(settings.directory)).name == "step-00000002"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    assert_same(launch.run(settings), uninterrupted)


def test_a_write_error_names_the_file_even_if_fsync_raises_it(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: '.*/a\.pt'"):
        patch.setattr(os, "fsync", full)
        Writer(tmp_path).save({}, tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("number", "name", "refused", "expected"),
    [
        (errno.ENOSPC, "run/checkpoints/a.pt", None, r"No space left on device: .*/a\.pt; "),
        (errno.EACCES, "elsewhere/data.arrow", None, None),
        (errno.EIO, None, None, None),
        (errno.EIO, 7, None, None),
        (errno.EIO, None, "Read-only file system", r"\(Read-only file system; "),
        (errno.ENOSPC, "elsewhere/data.arrow", "No space left on device", r"\(No space left on device; "),
        (errno.ENOENT, "run/checkpoints/a.pt", "Read-only file system", None),
    ],
)
def test_only_errors_of_the_runs_own_storage_are_reported_as_storage_errors(
    tmp_path, monkeypatch, number, name, refused, expected
):
    run = RunDirectory(tmp_path / "run")
    run.create()
    if refused:
        monkeypatch.setattr(storage, "write_failure", lambda directory: refused)
    error = OSError(number, os.strerror(number), str(tmp_path / name) if isinstance(name, str) else name)
    found = storage_failure(run, error)
    assert re.search(expected, str(found)) if expected else found is None


def test_a_save_killed_before_its_last_rename_is_completed_and_others_are_removed(run):
    finals = [make_checkpoint(run, step) for step in (1, 2, 3)]
    partials = [directory.partial_of(final) for final in finals]
    for final, partial in zip(finals, partials, strict=True):
        final.rename(partial)
    (partials[1] / "manifest.json").unlink()
    make_checkpoint(run, 3)
    (run.checkpoints / ".partial-step-00000004").mkdir()
    clean_up_leftovers(run)
    assert names(run) == steps(1, 3)
    assert directory.partial_of(finals[0]) != partials[0], "the killed start could still write into the new directory"
