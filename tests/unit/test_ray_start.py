"""Ray waits for ever where it cannot start a worker; the launcher does not."""

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
    check = ray_train._sign_of_life([run])
    check()
    monkeypatch.setattr(ray_train, "START_TIMEOUT", 0)
    with pytest.raises(WorkerError, match="Ray started no worker within 0 s"):
        check()
    run.log_file(1).touch()
    check()
