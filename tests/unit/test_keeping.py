"""Which checkpoints are kept, what may not go on from them, who may write them, and what can be seen in them."""

import errno
import json
import multiprocessing
import os
import shutil
import threading
import time

import pytest

from tests.unit.test_checkpoint import STEPS, assert_same, config, flip_a_bit, make_checkpoint, model, whole  # noqa: F401
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import directory, manifest
from tutorial_lib.cli import main
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.lab.lesson import remove_runs
from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory

ALONE = Topology(dp=1, tp=1, rank=0)


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create()
    return run


def names(run):
    checkpoint.finish_deletions()
    return sorted(path.name for path in run.checkpoints.iterdir())


def steps(*numbers):
    return [f"step-{number:08d}" for number in numbers]


def pruner(run, **flat):
    return checkpoint.Pruner(run, Config.create("cpu", dp=1, engine="torch", **flat), ALONE)


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
    checkpoint.clear_remains(run)
    assert names(run) == sorted([*others, "note.txt", *steps(3)])
    with pytest.raises(ValueError, match="not named as a checkpoint"):
        directory.delete(run.checkpoints / "mine")


def test_a_damaged_checkpoint_does_not_count_as_kept(run):
    for step in (1, 2, 3, 4):
        make_checkpoint(run, step)
    flip_a_bit(checkpoint.directory_of(run, 3) / "trainer.json")
    pruner(run, keep_last=2).prune(checkpoint.directory_of(run, 4))
    assert names(run) == steps(2, 3, 4)


def test_a_damaged_checkpoint_of_a_later_step_neither_counts_nor_goes(run):
    """The run went back to step 2 and has saved step 3; step 4 is what it left out."""
    for step in (1, 2, 3, 4):
        make_checkpoint(run, step)
    flip_a_bit(checkpoint.directory_of(run, 4) / "trainer.json")
    pruner(run, keep_last=1).prune(checkpoint.directory_of(run, 3))
    assert names(run) == steps(3, 4)


def test_the_best_that_is_damaged_gives_way_to_the_best_that_is_whole(run):
    for step, loss in enumerate((2.0, 1.0, 3.0, 4.0), 1):
        path = make_checkpoint(run, step, record={"eval_loss": loss})
        (path / "more").write_text("more")
        listed = {name: manifest.digest(path / name) for name in ("trainer.json", "more")}
        (path / "manifest.json").write_text(json.dumps({"format": 2, "files": listed}))
    (checkpoint.directory_of(run, 2) / "more").write_text("less")
    pruner(run, keep_last=1, keep_best=True).prune(checkpoint.directory_of(run, 4))
    assert names(run) == steps(1, 4)


@pytest.fixture
def unreadable(monkeypatch):
    """Steps whose files the storage does not give at the moment."""
    steps_of_none, digest = set(), manifest.digest

    def failing(path):
        if directory.step_of(path.parent) in steps_of_none:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return digest(path)

    monkeypatch.setattr(manifest, "digest", failing)
    return steps_of_none


def of_a_newer_format(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"format": 2', '"format": 3'))


def test_where_fewer_whole_ones_are_found_than_are_to_be_kept_nothing_goes(run):
    for step in (1, 2, 3):
        flip_a_bit(make_checkpoint(run, step) / "trainer.json")
    make_checkpoint(run, 4)
    make_checkpoint(run, 5)
    assert pruner(run, keep_last=3).prune(checkpoint.directory_of(run, 5)) == []
    assert names(run) == steps(1, 2, 3, 4, 5)


def test_what_cannot_be_read_now_neither_counts_nor_goes_and_is_asked_again(run, unreadable):
    for step in (1, 2, 3, 4):
        make_checkpoint(run, step)
    unreadable |= {1, 3}
    keeper = pruner(run, keep_last=2)
    keeper.prune(checkpoint.directory_of(run, 4))
    assert names(run) == steps(1, 2, 3, 4)
    unreadable.clear()
    keeper.prune(checkpoint.directory_of(run, 4))
    assert names(run) == steps(3, 4)


def test_the_best_that_cannot_be_read_now_does_not_go(run, unreadable):
    for step, loss in enumerate((1.0, 2.0, 3.0, 4.0), 1):
        make_checkpoint(run, step, record={"eval_loss": loss})
    unreadable |= {1}
    pruner(run, keep_last=1, keep_best=True).prune(checkpoint.directory_of(run, 4))
    assert names(run) == steps(1, 2, 4)


def test_what_a_newer_version_has_written_neither_counts_nor_goes(run):
    for step in (1, 2, 3, 4, 5):
        make_checkpoint(run, step)
    for step in (2, 4):
        of_a_newer_format(checkpoint.directory_of(run, step))
    pruner(run, keep_last=2).prune(checkpoint.directory_of(run, 5))
    assert names(run) == steps(2, 3, 4, 5)


def test_a_manifest_that_cannot_be_read_is_not_one_that_is_missing(run):
    path = make_checkpoint(run, 1)
    (path / "manifest.json").unlink()
    assert not isinstance(manifest.damage(path), manifest.Unreadable)
    (path / "manifest.json").mkdir()
    assert isinstance(manifest.damage(path), manifest.Unreadable)


def test_a_save_killed_before_its_last_rename_is_completed_and_others_are_removed(run):
    finals = [make_checkpoint(run, step) for step in (1, 2, 3)]
    partials = [directory.partial_of(final) for final in finals]
    for final, partial in zip(finals, partials, strict=True):
        final.rename(partial)
    (partials[1] / "manifest.json").unlink()
    make_checkpoint(run, 3)
    (run.checkpoints / ".partial-step-00000004").mkdir()
    checkpoint.clear_remains(run)
    assert names(run) == steps(1, 3)
    assert directory.partial_of(finals[0]) != partials[0], "what outlives a start writes into another one"


def test_a_deletion_that_is_interrupted_leaves_nothing_that_looks_like_a_checkpoint(run, monkeypatch):
    for step in (1, 2):
        make_checkpoint(run, step)

    def killed(doomed):
        (doomed / "trainer.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(directory, "_discard", killed)
        with pytest.raises(KeyboardInterrupt):
            pruner(run, keep_last=1).prune(checkpoint.directory_of(run, 2))
    remains, *seen = names(run)
    assert remains.startswith(".deleting-step-00000001-")
    assert seen == steps(2)
    assert checkpoint.newest_intact(run) == (checkpoint.directory_of(run, 2), [])
    checkpoint.clear_remains(run)
    assert names(run) == steps(2)


def test_pruning_does_not_wait_until_files_are_gone(run, monkeypatch):
    """Freeing the room of a large file takes a while on some disks."""
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
        assert len(list(run.checkpoints.iterdir())) == 2, "the room is not free yet"
        may_delete.set()
        checkpoint.finish_deletions()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == steps(2)


def test_a_run_that_prunes_is_the_run_that_keeps_all(whole, model, tmp_path):  # noqa: F811
    settings = config(tmp_path, model=model, checkpoint_every=2, keep_last=2, keep_best=True, evaluate=True)
    launch.run(settings.override(stop_after=5))
    run = launch.run(settings)
    assert_same(run, whole)
    losses = {
        path.name: loss for path, loss in checkpoint.retention.eval_losses(directory.checkpoints(run.directory)).items()
    }
    assert run.result["eval_loss"] == losses[steps(STEPS)[0]]
    assert {*steps(6, 7)} <= losses.keys()
    assert len(losses) <= 3 and min(losses.values()) <= losses[steps(STEPS)[0]]


def test_a_run_that_is_asked_to_stop_saves_without_evaluating_first(model, tmp_path, monkeypatch):  # noqa: F811
    import signal

    from tutorial_lib.engine.single import TorchEngine

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
        ({"max_failures": 1}, r"launcher='local' starts nothing again: write launcher='ray'.*same command again"),
        ({"max_failures": 1, "launcher": "none"}, "write launcher='ray'"),
        ({"max_failures": -1, "launcher": "ray"}, "smallest possible value is 0"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(flat, message):
    with pytest.raises(ConfigError, match=message):
        Config.create("cpu", **flat)


# --------------------------------------------------------------------------------------------------------- identity


@pytest.fixture
def own_model(model, tmp_path):  # noqa: F811
    """A copy of the model that a test may change, and a run of it."""
    own = tmp_path / "model"
    shutil.copytree(model, own)
    return own, launch.run(config(tmp_path, model=str(own), stop_after=2))


def test_another_model_of_the_same_name_is_refused_before_anything_starts(own_model):
    own, run = own_model
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"n_layer": settings["n_layer"] // 2, "embd_pdrop": 0.2}))
    with pytest.raises(
        ConfigError, match=r"another model.*embd_pdrop was 0.1, now 0.2; n_layer was 2, now 1\."
    ) as error:
        launch.preflight(run.config.override(stop_after=None))
    assert "or give the new run another name" in str(error.value)


def test_another_tokenizer_is_refused_before_anything_starts(own_model):
    """Two tokens exchanged: as many as before, and every text becomes other ids."""
    own, run = own_model
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"another tokenizer than the one of its checkpoint.*another name"):
        launch.preflight(run.config.override(stop_after=None))


def test_what_says_nothing_of_the_model_may_differ(own_model):
    own, run = own_model
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"transformers_version": "0", "use_cache": False}))
    assert launch.run(run.config.override(stop_after=None)).result["resumed_from"] == 2


# ------------------------------------------------------------------------------------------------------------- lock


def hold_lock(run, which, held):
    with checkpoint.held_for_launch(run) if which == "launch" else checkpoint.held_for_training(run, ALONE):
        held.set()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds one of a run's locks. It is forked, as a new one takes seconds to import torch."""
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
def test_a_second_start_is_refused_and_told_who_runs(holder, tmp_path, capsys, which):
    process = holder(which)
    (tmp_path / "run" / ".stop-requested").write_text("of the first")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    given = ["--engine", "torch", "--dp", "1", "--launcher", "none", "--steps", "1", "--storage", str(tmp_path)]
    began = time.monotonic()
    assert main(["train", *given]) == 2
    shown = capsys.readouterr().err
    assert (
        f"Run 'run' in {tmp_path} is running already: process {process.pid} on {os.uname().nodename}, since 20" in shown
    )
    assert "give this run another name" in shown
    assert time.monotonic() - began < checkpoint.lock.PREDECESSOR_SECONDS
    after = sorted(
        (path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*") if ".lock" not in path.name
    )
    assert after == [each for each in before if ".lock" not in each[0].name and each[0] != tmp_path]


@pytest.mark.parametrize("which", ["launch", "training"])
def test_a_killed_process_holds_nothing(holder, tmp_path, which):
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


# ---------------------------------------------------------------------------------------------------------- inspect


def test_inspecting_a_checkpoint_tells_what_is_in_it(whole, capsys):  # noqa: F811
    path = checkpoint.latest(whole.directory)
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["step"], report["whole"], report["damage"]) == (STEPS, True, [])
    assert report["settings"]["engine"] == "torch" and report["versions"]["torch"]
    assert report["written"]["host"] == os.uname().nodename
    there = {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*") if p.is_file()}
    del there["manifest.json"]
    assert {file["file"]: file["bytes"] for file in report["files"]} == there
    assert sum(report["parts"].values()) == sum(report["ranks"].values()) == report["bytes"] == sum(there.values())
    assert report["parts"]["weights"] == there["engine/model.pt"]
    assert report["parts"]["optimizer"] == there["engine/optimizer.pt"]
    assert report["parts"]["random states and data position"] == there["rank-000.pt"]
    assert main(["inspect", str(path)]) == 0
    assert "yes, every byte is as it was written" in capsys.readouterr().out


def test_inspecting_a_run_tells_which_checkpoints_are_whole(run, capsys):
    for step, loss in enumerate((2.0, 1.0, 3.0, 0.5), 1):
        make_checkpoint(run, step, record={"eval_loss": loss})
    damaged = checkpoint.directory_of(run, 4) / "trainer.json"
    damaged.write_text(damaged.read_text().replace("0.5", "0.4"))
    (checkpoint.directory_of(run, 1) / "more").write_text("")
    assert main(["inspect", str(run.path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["whole"] for row in report["checkpoints"]] == [True, True, True, False]
    assert (report["newest"], report["best"]) == (steps(3)[0], steps(2)[0])
    assert main(["inspect", str(damaged.parent)]) == 1
    shown = capsys.readouterr().out
    assert f"{damaged} was altered" in shown and "<- DAMAGED" in shown
    assert main(["inspect", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "<- best" in shown and "<- newest" in shown and f"NO: {damaged} was altered" in shown


def test_inspecting_unpickles_nothing(run, tmp_path, capsys):
    """A file that would, when unpickled, leave a trace."""
    import pickle

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    path = make_checkpoint(run, 1)
    for name in ("rank-000.pt", "engine/.metadata", "engine/model.pt"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(pickle.dumps(Trap()))
    assert main(["inspect", str(path)]) == 0
    assert not (tmp_path / "sprung").exists()
    assert "NOT IN THE MANIFEST" in capsys.readouterr().out


def test_what_is_neither_a_checkpoint_nor_a_run_is_said(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "neither a checkpoint nor the directory of a run" in capsys.readouterr().err
