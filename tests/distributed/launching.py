"""Launches with the observing worker in place of the library's; everything else is ``tutorial_lib.launch``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tutorial_lib import launch
from tutorial_lib.config import Config
from tutorial_lib.launch import local
from tutorial_lib.records import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
_THEIRS = "tutorial_lib.launch.worker"


def observe(configs: Sequence[Config], worker: str = "tests.distributed.worker") -> list[launch.Run]:
    """``launch.run_all`` with processes that leave observations: a module with the arguments of the library's."""
    start_processes = local.start_processes

    def start(*, args: dict[int, Sequence[str]], **options: Any) -> Any:
        assert all(_THEIRS in arguments for arguments in args.values())
        ours = {rank: tuple(worker if a == _THEIRS else a for a in arguments) for rank, arguments in args.items()}
        return start_processes(args=ours, **options)

    with pytest.MonkeyPatch.context() as patch, mock.patch.object(local, "start_processes", start):
        patch.setenv("PYTHONPATH", str(ROOT), prepend=":")
        return launch.run_all(configs)


def train_command(config: Config) -> list[str]:
    """What to type after ``python -m`` for a run with this configuration."""
    given = ["tutorial_lib", "train", "--json"]
    for name, value in config.flat().items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        elif value not in (None, ()):
            given += [f"--{flag}", str(value)]
    return given


class Shell:
    """Starts ``python -m ...`` as a shell would: in a process group of its own, its output in files."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, given: Sequence[str]) -> None:
        with (self.scratch / "stdout").open("wb") as out, (self.scratch / "stderr").open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *given],
                stdout=out,
                stderr=err,
                cwd=ROOT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def wait_for_step(self, run: RunDirectory, step: int) -> None:
        assert self.process is not None
        while not any(row["step"] >= step for row in run.rows()):
            assert self.process.poll() is None, (self.scratch / "stderr").read_text()
            time.sleep(0.02)

    def exit_code(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=240)

    def result(self) -> dict[str, object]:
        return dict(json.loads((self.scratch / "stdout").read_text()))

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
