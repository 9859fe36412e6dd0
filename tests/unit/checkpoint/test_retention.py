"""Retention: the checkpoints that are kept, and the ones that may be deleted."""

import errno
import json
import os
import shutil
import threading

import pytest

from tests.support.damaged_files import flip_a_bit
from tests.support.torch_runs import ALONE, STEPS, assert_same, config, make_checkpoint, names, steps
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import directory, manifest
from tutorial_lib.checkpoint.directory import clean_up_leftovers, finish_deletions
from tutorial_lib.checkpoint.retention import Pruner
from tutorial_lib.config import Config, ConfigError, RunConfig
from tutorial_lib.engine.single import TorchEngine


def pruner(run, **flat):
    return Pruner(run, RunConfig(**flat), ALONE)


@pytest.mark.parametrize(
    ("flat", "kept"),
    [
        ({}, (1, 2, 3, 4, 5)),
        ({"keep_best": True}, (1, 2, 3, 4, 5)),
        ({"keep_last": 9}, (1, 2, 3, 4, 5)),
        ({"keep_last": 2}, (4, 5)),
        ({"keep_last": 1, "keep_best": True}, (2, 5)),
        ({"keep_last": 4, "keep_best": True}, (2, 3, 4, 5)),
    ],
)
def test_the_newest_few_and_the_best_are_kept(run, flat, kept):
    for step, loss in enumerate((3.0, 1.0, 2.0, None, 1.5), 1):
        make_checkpoint(run, step, record={"eval_loss": loss} if loss else {})
    pruner(run, **flat).prune(checkpoint.directory_of(run, 5))
    assert names(run) == steps(*kept)


def test_nothing_else_is_ever_deleted(run):
    for step in (1, 2, 3):
        make_checkpoint(run, step)
    others = ("step-1", "step-000000011", "step-00000001.bak", "mine", ".partial-of-mine", "step-0000000a")
    for name in others:
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "note.txt").write_text("")
    pruner(run, keep_last=1).prune(checkpoint.directory_of(run, 3))
    clean_up_leftovers(run)
    assert names(run) == sorted([*others, "note.txt", *steps(3)])
    with pytest.raises(ValueError, match="not named like a checkpoint"):
        directory.delete(run.checkpoints / "mine")


def test_a_damaged_checkpoint_does_not_count_as_kept(run):
    for step in (1, 2, 3, 4):
        make_checkpoint(run, step)
    flip_a_bit(checkpoint.directory_of(run, 3) / "trainer.json")
    pruner(run, keep_last=2).prune(checkpoint.directory_of(run, 4))
    assert names(run) == steps(2, 3, 4)


def test_a_damaged_later_checkpoint_is_not_counted_and_not_deleted(run):
    """The run skipped the damaged step 4, went back to step 2, and saved step 3."""
    for step in (1, 2, 3, 4):
        make_checkpoint(run, step)
    flip_a_bit(checkpoint.directory_of(run, 4) / "trainer.json")
    pruner(run, keep_last=1).prune(checkpoint.directory_of(run, 3))
    assert names(run) == steps(3, 4)


def test_a_damaged_best_checkpoint_is_replaced_by_the_best_intact_one(run):
    for step, loss in enumerate((2.0, 1.0, 3.0, 4.0), 1):
        path = make_checkpoint(run, step, record={"eval_loss": loss})
        (path / "more").write_text("more")
        listed = {name: manifest.file_entry(path / name) for name in ("trainer.json", "more")}
        (path / "manifest.json").write_text(json.dumps({"format": 2, "files": listed}))
    (checkpoint.directory_of(run, 2) / "more").write_text("less")
    pruner(run, keep_last=1, keep_best=True).prune(checkpoint.directory_of(run, 4))
    assert names(run) == steps(1, 4)


@pytest.fixture
def unreadable(monkeypatch):
    """Return an empty set. The files of every step that a test adds to it become unreadable."""
    steps_of_none, file_entry = set(), manifest.file_entry

    def failing(path):
        if directory.step_of(path.parent) in steps_of_none:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return file_entry(path)

    monkeypatch.setattr(manifest, "file_entry", failing)
    return steps_of_none


def of_a_newer_format(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"format": 2', '"format": 3'))


def test_nothing_is_deleted_while_too_few_checkpoints_are_intact(run):
    for step in (1, 2, 3):
        flip_a_bit(make_checkpoint(run, step) / "trainer.json")
    make_checkpoint(run, 4)
    make_checkpoint(run, 5)
    assert pruner(run, keep_last=3).prune(checkpoint.directory_of(run, 5)) == []
    assert names(run) == steps(1, 2, 3, 4, 5)


def test_an_unreadable_checkpoint_is_not_counted_not_deleted_and_checked_again(run, unreadable):
    for step in (1, 2, 3, 4):
        make_checkpoint(run, step)
    unreadable |= {1, 3}
    keeper = pruner(run, keep_last=2)
    keeper.prune(checkpoint.directory_of(run, 4))
    assert names(run) == steps(1, 2, 3, 4)
    unreadable.clear()
    keeper.prune(checkpoint.directory_of(run, 4))
    assert names(run) == steps(3, 4)


def test_an_unreadable_best_checkpoint_is_not_deleted(run, unreadable):
    for step, loss in enumerate((1.0, 2.0, 3.0, 4.0), 1):
        make_checkpoint(run, step, record={"eval_loss": loss})
    unreadable |= {1}
    pruner(run, keep_last=1, keep_best=True).prune(checkpoint.directory_of(run, 4))
    assert names(run) == steps(1, 2, 4)


def test_a_checkpoint_of_a_newer_format_is_not_counted_and_not_deleted(run):
    for step in (1, 2, 3, 4, 5):
        make_checkpoint(run, step)
    for step in (2, 4):
        of_a_newer_format(checkpoint.directory_of(run, step))
    pruner(run, keep_last=2).prune(checkpoint.directory_of(run, 5))
    assert names(run) == steps(2, 3, 4, 5)


def test_a_deletion_that_is_interrupted_leaves_nothing_that_looks_like_a_checkpoint(run, monkeypatch):
    for step in (1, 2):
        make_checkpoint(run, step)

    def killed(thread):
        (doomed,) = run.checkpoints.glob(".deleting-*")
        (doomed / "trainer.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", killed)  # this thread would remove the files
        with pytest.raises(KeyboardInterrupt):
            pruner(run, keep_last=1).prune(checkpoint.directory_of(run, 2))
    remains, *seen = names(run)
    assert remains.startswith(".deleting-step-00000001-")
    assert seen == steps(2)
    assert directory.newest_intact(run) == (checkpoint.directory_of(run, 2), [])
    clean_up_leftovers(run)
    assert names(run) == steps(2)


def test_pruning_does_not_wait_until_files_are_gone(run, monkeypatch):
    """Freeing the space of a large file takes a while on some disks."""
    for step in (1, 2):
        make_checkpoint(run, step)
    rmtree, may_delete = shutil.rmtree, threading.Event()

    def slow(*given):
        assert may_delete.wait(60)
        rmtree(*given)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", slow)
        assert pruner(run, keep_last=1).prune(checkpoint.directory_of(run, 2)) == steps(1)
        assert [path.name for path in directory.checkpoints(run)] == steps(2)
        assert len(list(run.checkpoints.iterdir())) == 2, "the files are not gone yet"
        may_delete.set()
        finish_deletions()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == steps(2)


def test_pruning_does_not_change_the_run(uninterrupted, model, tmp_path):
    settings = config(tmp_path, model=model, checkpoint_every=2, keep_last=2, keep_best=True, evaluate=True)
    launch.run(settings.override(stop_after=5))
    run = launch.run(settings)
    assert_same(run, uninterrupted)
    losses = {
        path.name: loss for path, loss in checkpoint.retention.eval_losses(directory.checkpoints(run.directory)).items()
    }
    assert run.result["eval_loss"] == losses[steps(STEPS)[0]]
    assert {*steps(6, 7)} <= losses.keys()
    assert len(losses) <= 3 and min(losses.values()) <= losses[steps(STEPS)[0]]


def test_a_run_that_is_asked_to_stop_saves_without_evaluating_first(model, tmp_path, monkeypatch):
    import signal

    update = TorchEngine.step
    monkeypatch.setattr(TorchEngine, "step", lambda self: signal.raise_signal(signal.SIGTERM) or update(self))
    run = launch.run(config(tmp_path, model=model, keep_best=True, evaluate=True))
    assert run.result["status"] == "stopped"
    assert "eval_loss" not in manifest.read_trainer_state(checkpoint.latest(run.directory))["record"]


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"keep_last": 0}, "smallest possible value is 1"),
        ({"keep_best": True, "evaluate": False}, "write evaluate=True, or keep_best=False"),
        ({"max_failures": 1}, r"launcher='local' does not restart workers. Write launcher='ray'.*same command again"),
        ({"max_failures": 1, "launcher": "none"}, "Write launcher='ray'"),
        ({"max_failures": -1, "launcher": "ray"}, "smallest possible value is 0"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(flat, message):
    with pytest.raises(ConfigError, match=message):
        Config.create("cpu", **flat)
