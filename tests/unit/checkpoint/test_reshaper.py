"""Reshape: the configuration of the new shape, and interruptions."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.torch_runs import config
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import directory, manifest
from tutorial_lib.checkpoint.reshaper import reshaped_config
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.records import RunDirectory

SHAPES = {
    "another engine": (
        {"zero_stage": 2, "offload": "optimizer", "deepspeed": "zero2_cpu_offload"},
        {"engine": "fsdp"},
        {"engine": "fsdp", "dp": 2, "offload": "none", "deepspeed": None, "zero_stage": 3},
    ),
    "a stage that the DeepSpeed file does not name": (
        {"zero_stage": 2, "deepspeed": "zero2"},
        {"zero_stage": 3},
        {"zero_stage": 3, "deepspeed": None},
    ),
    "the same file on more ranks": (
        {"zero_stage": 2, "deepspeed": "zero2"},
        {"dp": 4},
        {"zero_stage": 2, "deepspeed": "zero2", "dp": 4},
    ),
    "another sharding": (
        {"engine": "fsdp", "dp": 4, "sharding": "hybrid_shard", "shard_size": 2},
        {"sharding": "full_shard"},
        {"sharding": "full_shard", "shard_size": None, "dp": 4},
    ),
    "DDP reduces full gradients": (
        {"engine": "fsdp", "dp": 2, "sharding": "full_shard", "reduce_each": True},
        {"sharding": "no_shard"},
        {"sharding": "no_shard", "reduce_each": False},
    ),
    "one start's own settings are not taken over": (
        {"stop_after": 3, "steps": 9, "measure": True, "evaluate": False, "launcher": "none"},
        {"engine": "fsdp"},
        {"stop_after": None, "steps": 9, "measure": False, "evaluate": False, "launcher": "local"},
    ),
}


def saved_with(run, **flat):
    path = checkpoint.directory_of(RunDirectory(run), 3)
    path.mkdir(parents=True)
    flat = {name: value for name, value in Config.create("cpu", **flat).flat().items() if name != "storage"}
    (path / "trainer.json").write_text(json.dumps({"format": 1, "step": 3, "config": flat}))
    return path


@pytest.mark.parametrize("what", SHAPES)
def test_a_reshape_keeps_settings_that_fit_the_new_shape(tmp_path, what):
    saved, given, expected = SHAPES[what]
    reshaped = reshaped_config(saved_with(tmp_path / "old", **saved), {"name": "new", **given})
    assert {name: reshaped.flat()[name] for name in expected} == expected
    assert reshaped.directory == tmp_path / "new", "beside the old run"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "write its name"),
        (
            {"name": "new", "seed": 1, "global_batch": 4},
            r"seed was 0, now 1; global_batch was 8, now 4.* export \S+/old DIR",
        ),
        ({"name": "new", "launcher": "none"}, "just continue the run in the new shape"),
        ({"name": "new", "stop_after": 5}, "stop_after cannot be set"),
        ({"name": "new", "engine": "torch"}, "Write dp=1, tp=1"),
        ({"name": "new", "zero_stge": 1}, "Did you mean 'zero_stage'"),
        ({"name": "old"}, "There is already a run .*old. Give the new run another name"),
    ],
)
def test_an_impossible_reshape_is_refused_before_anything_is_created(tmp_path, given, message):
    path = saved_with(tmp_path / "old")
    with pytest.raises(ConfigError, match=message):
        reshaped_config(path, given)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_reshape_leaves_no_run(interrupted, monkeypatch, error):
    """The next attempt also removes the leftovers of a killed one."""
    storage = interrupted.directory.path.parent
    (storage / ".new.reshaping" / "new").mkdir(parents=True)
    (storage / ".new.reshaping" / "new" / "half").write_text("")

    def fail(start):
        made = [path.name for path in RunDirectory(start.directory).checkpoints.iterdir()]
        assert made == ["step-00000004"] and not (start.directory / "half").exists()
        raise error

    monkeypatch.setattr(launch.runs, "run", fail)
    with pytest.raises(error):
        launch.reshape(interrupted.directory.path, name="new", activation_checkpointing=True)
    assert [path.name for path in storage.iterdir()] == [interrupted.directory.path.name]
    checkpoint.verify(checkpoint.latest(interrupted.directory))


def test_a_reshape_that_fills_the_disk_says_so_in_one_line(interrupted, monkeypatch):
    storage = interrupted.directory.path.parent

    def fail(source, target, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(shutil, "copy2", fail)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"cannot be copied: .* No space left on device: .*no new run"
    ) as error:
        launch.reshape(interrupted.directory.path, name="new")
    assert str(error.value).count("No space left") == 1
    assert [path.name for path in storage.iterdir()] == [interrupted.directory.path.name]


def test_a_failed_reshape_keeps_the_log_that_its_error_names(interrupted, monkeypatch):
    storage = interrupted.directory.path.parent

    def failing(start):
        RunDirectory(start.directory).log_file(0).write_text("what rank 0 said")
        raise launch.WorkerError("rank 0 failed")

    monkeypatch.setattr(launch.runs, "run", failing)
    for _ in range(2):
        with pytest.raises(launch.WorkerError):
            launch.reshape(interrupted.directory.path, name="new")
        hidden = storage / ".new.reshaping"
        assert [path for path in hidden.rglob("*.log")] == [hidden / "new" / "logs" / "rank-000.log"]
        assert not list(hidden.rglob("*.pt")), "the checkpoint's files must be gone"
    assert not (storage / "new").exists()


def test_a_reshape_needs_no_data(model, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text('{"text": "Some text that is long enough."}\n' * 8)
    flat = {"model": model, "dataset": str(data), "steps": None, "stop_after": 1}
    old = launch.run(config(tmp_path, name="old", **flat))
    shutil.rmtree(data)
    run = launch.run
    monkeypatch.setattr(launch.runs, "run", lambda start: run(start.override(launcher="none")))
    new = launch.reshape(old.directory.path, name="new", engine="fsdp")
    assert (new.result["step"], new.result["num_steps"]) == (1, old.result["num_steps"])
    before, after = (checkpoint.open_full(checkpoint.latest(each.directory)) for each in (old, new))
    assert all(after.parameter(name).equal(before.parameter(name)) for name in before.names)
    states = [manifest.read_trainer_state(checkpoint.latest(each.directory)) for each in (old, new)]
    assert states[0]["identity"]["data"] == states[1]["identity"]["data"] != {}


def test_a_source_may_be_under_the_users_home(interrupted, monkeypatch):
    monkeypatch.setenv("HOME", str(interrupted.directory.path.parent))
    found = directory.locate(Path("~") / interrupted.directory.path.name)
    assert found == checkpoint.latest(interrupted.directory)
