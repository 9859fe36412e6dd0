"""Signals from outside, and a second start of a running run."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed import cases
from tests.distributed.comparing import Observed
from tests.distributed.faults.checks import SOON, assert_all_intact, assert_same_records, assert_same_states
from tests.distributed.launching import Shell, train_command
from tutorial_lib import launch
from tutorial_lib.config import ConfigError
from tutorial_lib.records import RunDirectory


@pytest.fixture(scope="module")
def signalled(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Start a long run; refuse it a second start, stop it by SIGTERM, kill its next launcher, and let it end."""
    shell = Shell(tmp_path_factory.mktemp("shell"))
    config = cases.saving(directory, "zero1", "signalled", checkpoint_every=0, **cases.LONG)
    run, seen = RunDirectory(config.directory), {"config": config}
    try:
        shell.start(train_command(config))
        shell.wait_for_step(run, 1)
        with pytest.raises(ConfigError) as error:
            launch.run(config)
        seen["second_start"] = str(error.value), shell.process.pid
        os.killpg(shell.process.pid, signal.SIGTERM)
        seen["stopped"] = shell.exit_code(), (shell.scratch / "stderr").read_text(), shell.result()

        shell.start(train_command(config))
        shell.wait_for_step(run, seen["stopped"][2]["step"] + 1)
        workers = psutil.Process(shell.process.pid).children(recursive=True)
        os.kill(shell.process.pid, signal.SIGKILL)
        seen["alive"] = psutil.wait_procs(workers, timeout=SOON)[1]
        seen["killed"] = run.result()

        shell.start(train_command(config))
        seen["ended"] = shell.exit_code(), (shell.scratch / "stderr").read_text(), shell.result()
    finally:
        shell.end()
    return seen


@pytest.mark.fault(
    "SIGTERM, as a scheduler sends it before the end of a slot", "saves, exits with 75; the same command resumes"
)
def test_sigterm(signalled: dict[str, Any], uninterrupted: dict[str, Observed]) -> None:
    code, said, result = signalled["stopped"]
    assert (code, said, result["status"]) == (75, "", "stopped")
    assert 0 < result["step"] < signalled["killed"]["step"], "the next start went on"
    assert_ends_like(signalled, uninterrupted["long"])


@pytest.mark.fault("SIGKILL of the launching process", "the ranks save and stop; the same command resumes")
def test_sigkill_of_the_launching_process(signalled: dict[str, Any], uninterrupted: dict[str, Observed]) -> None:
    assert not signalled["alive"], "workers outlive the process that started them"
    assert signalled["killed"]["status"] == "stopped"
    assert signalled["ended"][2]["resumed_from"] == signalled["killed"]["step"] < cases.LONG["steps"]
    assert_ends_like(signalled, uninterrupted["long"])


@pytest.mark.fault(
    "two starts of one run at the same time",
    "the second is refused and told which process holds the run; the first is untouched",
)
def test_two_starts_of_one_run(signalled: dict[str, Any], uninterrupted: dict[str, Observed]) -> None:
    said, pid = signalled["second_start"]
    assert re.search(rf"is already running: process {pid} on \S+, since \d{{4}}-\S+\. Wait for its end", said)
    assert_ends_like(signalled, uninterrupted["long"])


def assert_ends_like(signalled: dict[str, Any], uninterrupted: Observed) -> None:
    code, said, result = signalled["ended"]
    assert (code, said, result["status"]) == (0, "", "completed")
    run = RunDirectory(signalled["config"].directory)
    assert_same_records(run, uninterrupted.directory)
    assert_same_states(run, uninterrupted.directory)
    assert_all_intact(run)
