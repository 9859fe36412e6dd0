"""What a user sees when a worker fails, and what is left: an error soon, the cause first, and a run that can go on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed import cases
from tests.distributed.comparing import Observed, assert_identical
from tests.distributed.launching import observe, train_command
from tutorial_lib import checkpoint, launch
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.records import RunDirectory

SOON = 30
"""Seconds from a rank's end to the error. Gloo's own timeout is 600."""


@pytest.fixture(scope="module")
def interrupted(directory: Path) -> dict[str, tuple[launch.WorkerError, float]]:
    """Both runs that fail in their second save: the error, and how long after it the launch ended."""
    outcomes = {}
    for name in cases.FATAL:
        config = interruptible(directory, name)
        with pytest.raises(launch.WorkerError) as error:
            observe([config])
        struck = (config.directory / "checkpoints" / ".partial-step-00000004" / "engine").stat().st_mtime
        outcomes[name] = error.value, time.time() - struck
    return outcomes


@pytest.fixture(scope="module")
def mended(directory: Path, interrupted: object) -> dict[str, Observed]:
    """The same runs, started again after the cause is gone."""
    configs = []
    for name in cases.FATAL:
        configs.append(interruptible(directory, name.replace("broken", "mended")))
        shutil.copytree(directory / "runs" / name, configs[-1].directory)
    observe(configs)
    return {config.run.name.replace("mended", "broken"): Observed.read(config) for config in configs}


def interruptible(directory: Path, name: str) -> Config:
    return cases.interruptible(directory, "zero1", "whole", name=name, checkpoint_every=2)


def test_a_failing_ranks_own_traceback_is_what_the_user_sees(interrupted):
    error, seconds = interrupted["broken-save_raises"]
    assert str(error).startswith("Rank 1 of run 'broken-save_raises' failed with OSError: the disk is full\n")
    assert 'raise OSError("the disk is full")' in str(error)
    assert "rank-001.log" in str(error)
    assert seconds < SOON


def test_a_killed_rank_is_an_error_soon(interrupted):
    """The other rank finds the connection closed; that is not what is reported."""
    error, seconds = interrupted["broken-killed_in_save"]
    assert "Rank 1 ended with exit code -9 and left no traceback: it was killed" in str(error)
    assert seconds < SOON


def test_no_process_is_left(interrupted):
    assert not [p for p in psutil.Process().children(recursive=True) if "distributed.worker" in " ".join(p.cmdline())]


@pytest.mark.parametrize("name", cases.FATAL)
def test_a_save_that_was_interrupted_leaves_the_one_before_it(interrupted, directory, name):
    run = RunDirectory(directory / "runs" / name)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [".partial-step-00000004", "step-00000002"]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    checkpoint.verify(checkpoint.latest(run))


@pytest.mark.parametrize("name", cases.FATAL)
def test_and_the_run_goes_on_from_there_bit_for_bit(mended, observed, name):
    run = mended[name]
    assert len(run.examples) == cases.END - 2
    assert_identical(run, observed(2, "whole.zero1"))
    assert not list(run.directory.checkpoints.glob(".partial*"))


def test_a_configuration_error_that_only_a_worker_finds_is_one_all_the_same(directory):
    blank = directory / "blank"
    blank.mkdir()
    (blank / "train.jsonl").write_text('{"text": " "}\n' * 8)
    config = cases.config(directory, name="blank", dataset="blank", dp=2)
    with pytest.raises(ConfigError, match="all 8 are blank") as error:
        launch.run(config)
    assert "Traceback" not in str(error.value)


def test_signals_stop_a_run_that_goes_on_to_the_same_end(observed, directory, shell):
    """SIGTERM to all of it, as from a scheduler; then the launching process is killed; then it is left alone."""
    whole = observed(2, "whole.long")
    config = cases.interruptible(directory, "long", "whole", name="signalled")
    run, steps = RunDirectory(config.directory), [0]

    shell.start(train_command(config))
    shell.wait_for_step(run, 1)
    os.killpg(shell.process.pid, signal.SIGTERM)
    assert shell.exit_code() == 75, (shell.scratch / "stderr").read_text()
    stopped = shell.result()
    assert stopped["status"] == "stopped"
    steps.append(stopped["step"])
    assert checkpoint.latest(run).name == f"step-{steps[1]:08d}"

    shell.start(train_command(config))
    shell.wait_for_step(run, steps[1] + 1)
    workers = psutil.Process(shell.process.pid).children(recursive=True)
    os.kill(shell.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=SOON)
    assert not alive, "workers outlive the process that started them"
    steps.append(run.result()["step"])
    assert run.result()["status"] == "stopped"

    shell.start(train_command(config))
    assert shell.exit_code() == 0, (shell.scratch / "stderr").read_text()
    assert shell.result()["resumed_from"] == steps[2]
    assert 0 < steps[1] < steps[2] < whole.config.run.steps
    for key in ("step", "loss", "grad_norm", "tokens", "epoch", "lr"):
        assert [row[key] for row in run.rows()] == [row[key] for row in whole.rows], key
    assert (shell.scratch / "stderr").read_text() == ""


def test_a_worker_failure_exits_with_1_and_the_ranks_error_on_top(observed, directory, shell):
    """One byte of one rank's shard: both ranks refuse, and what is printed is why."""
    config = observed(2, "halved.zero1").config.override(name="torn", stop_after=None)
    shutil.copytree(directory / "runs" / "halved.zero1", config.directory)
    torn = next((config.directory / "checkpoints").rglob("*zero_pp_rank_1_*optim_states.pt"))
    torn.write_bytes(torn.read_bytes()[:-1])
    shell.start(train_command(config))
    assert shell.exit_code() == 1
    error = (shell.scratch / "stderr").read_text()
    assert error.startswith("error: Rank ") and "failed with CheckpointError" in error.splitlines()[0]
    assert f"{torn} has" in error
    assert (shell.scratch / "stdout").read_text() == ""
