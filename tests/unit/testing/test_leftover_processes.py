"""Check for leftover processes after the last test: it finds the processes that a test left running, and no others."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests import conftest

ENDS_AT_ONCE_LEAVING_A_CHILD = (
    "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    " start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
)


@pytest.fixture
def orphan() -> Iterator[psutil.Process]:
    """Start a process whose parent has ended, like a daemon or the child of a killed launcher."""
    run = subprocess.run(
        [sys.executable, "-c", ENDS_AT_ONCE_LEAVING_A_CHILD], capture_output=True, text=True, check=True
    )
    process = psutil.Process(int(run.stdout))
    yield process
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def test_the_check_that_runs_is_the_one_tested_here() -> None:
    assert os.environ[conftest.MARK] == conftest.SESSION


def test_nothing_is_left_where_nothing_was_started() -> None:
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    assert conftest.leftover_processes(grace=2) == []


def test_an_orphan_is_found(orphan: psutil.Process) -> None:
    assert conftest.leftover_processes(grace=0) == [orphan]


def test_an_orphan_fails_the_last_test_and_is_killed(orphan: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "GRACE_SECONDS", 0)
    item: pytest.Item = None  # type: ignore[assignment]
    conftest.pytest_runtest_teardown(item, nextitem=object())  # type: ignore[arg-type]
    with pytest.raises(pytest.fail.Exception, match=f"left processes behind .*\n  {orphan.pid} .*time.sleep"):
        conftest.pytest_runtest_teardown(item, nextitem=None)
    assert psutil.wait_procs([orphan], timeout=5)[1] == []
