"""Storage that fills up, turns read-only, or raises an error in the middle of a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import crashing
from tests.distributed.faults import small_storage
from tests.distributed.faults.checks import assert_all_intact, assert_training_continued_during_the_save
from tests.distributed.faults.outcomes import RESUMES
from tests.distributed.observing.comparing import Observed, assert_identical
from tests.support.launching import ROOT
from tutorial_lib.records import RunDirectory


@pytest.fixture(scope="module")
def on_small_storage(directory: Path, uninterrupted: dict[str, Observed]) -> dict[str, dict[str, Any]]:
    """Return the report of :mod:`tests.distributed.faults.small_storage` on its runs."""
    trial = subprocess.run([*small_storage.NAMESPACE, "true"], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"this system does not allow mount namespaces: {trial.stderr.strip()}")
    command = [*small_storage.NAMESPACE, sys.executable, "-m", small_storage.__name__, str(directory)]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads((directory / "small_storage.json").read_text()))


@pytest.mark.fault(
    "a disk that fills up in the middle of a save", "stops with an error; once there is space, the same command resumes"
)
def test_a_full_disk(on_small_storage: dict[str, Any], uninterrupted: dict[str, Observed], directory: Path) -> None:
    assert re.search(r"cannot be written to \(No space left on device", start_of(on_small_storage["disk_full"]))
    assert_resumable(on_small_storage["disk_full"])
    assert_completed_like(crashing.saving(directory, "zero1", small_storage.NO_SPACE), uninterrupted["zero1"])


@pytest.mark.fault(
    "storage that becomes read-only", "stops with an error; once it is writable, the same command resumes"
)
def test_read_only_storage(
    on_small_storage: dict[str, Any], uninterrupted: dict[str, Observed], directory: Path
) -> None:
    assert re.search(r"cannot be written to \(Read-only file system", start_of(on_small_storage["read_only"]))
    assert_resumable(on_small_storage["read_only"])
    assert_completed_like(crashing.saving(directory, "zero1", small_storage.READ_ONLY), uninterrupted["zero1"])


@pytest.mark.fault("an exception in one rank's save", RESUMES)
def test_an_exception_in_a_save(assert_recovers: Callable[..., str]) -> None:
    said = assert_recovers("storage.save_raises")
    assert said.startswith("Rank 1 of run 'storage.save_raises' failed with OSError: the disk is full\n")
    assert 'raise OSError("the disk is full")' in said
    assert "rank-001.log" in said


@pytest.mark.fault("a rank hits the limit on file sizes while it writes in the background (`async_save`)", RESUMES)
def test_a_limit_on_file_sizes_in_the_background(assert_recovers: Callable[..., str], directory: Path) -> None:
    said = assert_recovers("storage.limit_in_write")
    first = said.splitlines()[0]
    assert first.startswith("Rank 1 of run 'storage.limit_in_write' failed with OSError: [Errno 27] File too large")
    assert re.search(r"/\.partial-step-00000004-[0-9a-f]{8}/engine/engine/", first)
    assert_training_continued_during_the_save(RunDirectory(directory / "runs/storage.limit_in_write"))


def start_of(report: dict[str, Any]) -> str:
    return "".join(report["error"].splitlines()[:2])


def assert_resumable(report: dict[str, Any]) -> None:
    assert "run the same command again" in report["error"]
    assert (report["newest"], report["left_out"]) == ("step-00000002", 0)


def assert_completed_like(config: Any, uninterrupted: Observed) -> None:
    assert_identical(Observed.read(config), uninterrupted)
    assert assert_all_intact(RunDirectory(config.directory)) == [2, 4, 6, 8]
