"""Runs with injected faults, launched once for all tests of this directory.

After each fault, a run either continues, with rows and final weights that equal the uninterrupted run's bit for bit, or
stops with an error that names the cause and says what to do. No intact checkpoint is lost.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.cases import crashing
from tests.distributed.cases.interruption import END
from tests.distributed.faults import damage
from tests.distributed.faults.checks import SOON, assert_all_intact
from tests.distributed.observing.comparing import Observed, assert_identical
from tests.distributed.observing.probe import Probe, ProbedRun, observe
from tests.support.commands import train_command
from tests.support.launching import Shell
from tutorial_lib import launch
from tutorial_lib.config import ConfigError
from tutorial_lib.records import RunDirectory


@dataclass(frozen=True)
class Crash:
    """A launch that a fault ended.

    Attributes:
        error: the launch's error.
        seconds: how long the launch outlived its last write.
    """

    error: launch.WorkerError
    seconds: float


@pytest.fixture(scope="session")
def uninterrupted(directory: Path) -> dict[str, Observed]:
    """Launch the uninterrupted runs, and return them by kind."""
    kinds = {kind for kind, _ in crashing.FATAL.values()}
    configs = {kind: crashing.saving(directory, kind, f"uninterrupted-saving.{kind}") for kind in kinds}
    name = "uninterrupted-saving.long"
    configs["long"] = crashing.saving(directory, "zero1", name, checkpoint_every=0, **crashing.LONG)
    observe([ProbedRun(config) for config in configs.values()])
    return {kind: Observed.read(config) for kind, config in configs.items()}


@pytest.fixture(scope="session")
def crashed(directory: Path) -> dict[str, Crash]:
    """Launch one run for every fault that ends its launch, and return the crashes by fault."""
    crashes = {}
    for fault, (kind, settings) in crashing.FATAL.items():
        config = crashing.saving(directory, kind, fault, **settings)
        with pytest.raises(launch.WorkerError) as error:
            observe([ProbedRun(config, Probe(fault=fault))])
        last = max(path.stat().st_mtime for path in config.directory.rglob("*") if "lock" not in path.name)
        crashes[fault] = Crash(error.value, time.time() - last)
    assert not [p for server in psutil.Process().children() for p in server.children()], "a rank outlives its launch"
    return crashes


@pytest.fixture(scope="session")
def recovered(directory: Path, uninterrupted: dict[str, Observed], crashed: object) -> dict[str, Observed]:
    """Restart, in one launch, copies of the runs that crashed and copies of a run with damaged checkpoints."""
    configs = {}
    for fault, (kind, settings) in crashing.FATAL.items():
        configs[fault] = crashing.saving(directory, kind, f"recovered.{fault}", **settings)
        shutil.copytree(directory / "runs" / fault, configs[fault].directory)
    for way in damage.WAYS:
        configs[way.__name__] = crashing.saving(directory, "zero1", f"recovered.{way.__name__}")
        shutil.copytree(uninterrupted["zero1"].directory.path, configs[way.__name__].directory)
        way(configs[way.__name__].directory)
    observe([ProbedRun(config) for config in configs.values()])
    return {name: Observed.read(config) for name, config in configs.items()}


@pytest.fixture(scope="session")
def assert_recovers(
    directory: Path, uninterrupted: dict[str, Observed], crashed: dict[str, Crash], recovered: dict[str, Observed]
) -> Callable[..., str]:
    """Return a function that checks everything that crashes have in common, and returns the error's text."""

    def check(
        fault: str, *, intact: Sequence[int] = (2,), resumes_from: int = 2, kept: Sequence[int] = (2, 4, 6, 8)
    ) -> str:
        """Check a crash and the next start.

        Args:
            fault: the fault that ended the run.
            intact: steps of the intact checkpoints that it left.
            resumes_from: step from which the next start resumes.
            kept: steps of the checkpoints that are left after the next start.
        """
        assert crashed[fault].seconds < SOON
        assert assert_all_intact(RunDirectory(directory / "runs" / fault)) == [*intact]
        run = recovered[fault]
        assert run.directory.result()["resumed_from"] == resumes_from
        assert len(run.examples) == END - resumes_from, "it trained the lost steps again, and no others"
        assert_identical(run, uninterrupted[crashing.FATAL[fault][0]])
        assert assert_all_intact(run.directory) == [*kept]
        assert not list(run.directory.checkpoints.glob(".*")), "half-written and half-deleted directories are gone"
        return str(crashed[fault].error)

    return check


@pytest.fixture(scope="session")
def assert_recovers_from_a_kill(assert_recovers: Callable[..., str]) -> Callable[..., None]:
    """Return a function that also checks that the error names the killed rank and the next start's checkpoint."""

    def check(fault: str, *, rank: int, resumes_from: int = 2, **expected: Sequence[int]) -> None:
        said = assert_recovers(fault, resumes_from=resumes_from, **expected)
        assert f"Rank {rank} ended with exit code -9 and left no traceback: it was killed" in said
        assert f"it resumes: {fault!r} from step-0000000{resumes_from}." in said

    return check


@pytest.fixture(scope="session")
def signalled(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Start a long run, try a second start, stop the run with SIGTERM, kill its next launcher, and let it end."""
    shell = Shell(tmp_path_factory.mktemp("shell"))
    config = crashing.saving(directory, "zero1", "signalled", checkpoint_every=0, **crashing.LONG)
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
