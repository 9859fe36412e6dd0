"""One rank of a run: its memory log begins and ends with the run. A signal between two runs is heeded."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.torch_runs import config
from tutorial_lib import trainer
from tutorial_lib.config import ConfigError
from tutorial_lib.measure.memory_log import read_memory_log
from tutorial_lib.records import RunDirectory


def is_sampling() -> bool:
    return any(thread.name == "memory-sampler" for thread in threading.enumerate())


def test_a_signal_after_a_runs_last_step_keeps_the_next_run_from_starting(tmp_path: Path) -> None:
    class SignalledAtItsEnd(trainer.Trainer):
        def close(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            super().close()

    runs = [config(tmp_path, model="embedded/gpt2", name=name, steps=1) for name in ("first", "second")]
    results = trainer.train_all(runs, trainer_class=SignalledAtItsEnd)
    assert [result.stopped_by for result in results] == [None]
    assert not RunDirectory(runs[1].directory).path.exists()


def test_a_stop_request_after_a_runs_last_step_keeps_the_next_run_from_starting(tmp_path: Path) -> None:
    """A launcher that got the signal writes the request into the directories of all its runs."""
    runs = [
        config(tmp_path, model="embedded/gpt2", name=name, steps=1, launcher="local") for name in ("first", "second")
    ]

    class RequestedAtItsEnd(trainer.Trainer):
        def close(self) -> None:
            RunDirectory(runs[1].directory).create()
            RunDirectory(runs[1].directory).stop_file.write_text("now")
            super().close()

    results = trainer.train_all(runs, trainer_class=RequestedAtItsEnd)
    assert [result.stopped_by for result in results] == [None]
    assert not RunDirectory(runs[1].directory).metrics_file.exists()


def test_a_run_logs_its_memory_if_asked(tmp_path: Path) -> None:
    settings = config(tmp_path, model="embedded/gpt2", memory_log_seconds=0.05)
    sampled: list[bool] = []

    def look(path: Path, row: dict[str, Any]) -> None:
        sampled.append(is_sampling())

    trainer.train(settings, on_checkpoint=look)
    assert sampled == [True] and not is_sampling()
    run = RunDirectory(settings.directory)
    held = read_memory_log(run.memory_log(0))["process tree"].summary()
    assert held.num_samples >= 2 and held.peak > sum(file.stat().st_size for file in run.checkpoints.rglob("*.pt")) > 0
    quiet = config(tmp_path, model="embedded/gpt2", name="quiet")
    trainer.train(quiet)
    assert not list(RunDirectory(quiet.directory).logs.glob("memory-*"))


def test_the_log_ends_with_a_run_that_fails(tmp_path: Path) -> None:
    settings = config(tmp_path, model="embedded/gpt2", memory_log_seconds=0.05, global_batch=64)
    with pytest.raises(ConfigError, match="fewer than global_batch=64"):
        trainer.train(settings)
    assert RunDirectory(settings.directory).memory_log(0).exists() and not is_sampling()


def test_a_log_that_cannot_be_written_is_an_error_of_the_rank(tmp_path: Path) -> None:
    settings = config(tmp_path, model="embedded/gpt2", memory_log_seconds=0.05)
    run = RunDirectory(settings.directory)
    run.memory_log(0).mkdir(parents=True)
    with pytest.raises(OSError, match="memory-rank-000"):
        trainer.train(settings)
    assert "memory-rank-000" in (run.logs / "rank-000.error.json").read_text()


def test_a_log_that_a_crash_left_torn_is_replaced(tmp_path: Path) -> None:
    settings = config(tmp_path, model="embedded/gpt2", memory_log_seconds=0.05)
    log = RunDirectory(settings.directory).memory_log(0)
    log.parent.mkdir(parents=True)
    log.write_text('{"form')
    trainer.train(settings)
    assert read_memory_log(log)["process tree"].summary().num_samples >= 2


def test_a_memory_log_needs_time_between_its_readings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory_log_seconds is 0; the smallest possible value is 0\.01"):
        config(tmp_path, memory_log_seconds=0)
