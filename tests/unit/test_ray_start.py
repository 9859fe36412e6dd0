"""Ray waits for ever where it cannot start a worker; the launcher does not."""

import json
import sys
from pathlib import Path

import pytest

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch import WorkerError, ray_train
from tutorial_lib.records import RunDirectory


def test_a_python_under_a_path_with_a_space_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "executable", "/an empty dir/bin/python")
    with pytest.raises(ConfigError, match="directory without spaces, or write launcher='local'"):
        ray_train.start(Config.create(launcher="ray"))


def test_no_worker_in_time_is_an_error_and_a_worker_is_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    check = ray_train._patience(ray_train._sign_of_life([run]))
    check()
    monkeypatch.setattr(ray_train, "START_TIMEOUT", 0)
    with pytest.raises(WorkerError, match="Ray started no worker within 0 s"):
        check()
    run.log_file(1).touch()
    check()


def test_rays_list_is_kept_while_its_checkpoints_are_there_and_dropped_when_one_is_gone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    listed = ["checkpoints/step-00000002", "checkpoints/step-00000004"]
    for name in listed:
        (tmp_path / name).mkdir(parents=True)
    snapshot = tmp_path / "checkpoint_manager_snapshot.json"
    content = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name} for name in listed]})
    ray_train._forget_deleted_checkpoints(run)
    snapshot.write_text(content)
    ray_train._forget_deleted_checkpoints(run)
    assert snapshot.read_text() == content
    (tmp_path / listed[0]).rmdir()
    ray_train._forget_deleted_checkpoints(run)
    assert not snapshot.exists()
    snapshot.write_text(content[:-9])
    ray_train._forget_deleted_checkpoints(run)
    assert not snapshot.exists()
