"""Stacks of running processes, read from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tutorial_lib.lab import call_stacks

SCRIPT = """\
import time

def outer():
    inner()

def inner():
    print("here", flush=True)
    time.sleep(60)

outer()
"""


@pytest.fixture
def sleeping(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that waits two calls deep."""
    script = tmp_path / "sleeps.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


def read(pid: int) -> call_stacks.Stack:
    """Read a stack, or skip the test if that is not possible."""
    try:
        return call_stacks.read_stack(pid)
    except call_stacks.CannotRead as why:
        pytest.skip(str(why))


def test_a_stack_names_files_lines_and_functions(sleeping: subprocess.Popen[str]) -> None:
    stack = read(sleeping.pid)
    assert stack[-3:] == ("sleeps.py:8 inner", "sleeps.py:4 outer", "sleeps.py:10 <module>")


def test_a_process_that_cannot_be_read_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(call_stacks.CannotRead):
        call_stacks.read_stack(ended.pid)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(call_stacks.CannotRead, match="pip install py-spy"):
        call_stacks.read_stack(ended.pid)


def test_ranks_come_in_the_order_of_their_numbers_and_others_are_left_out() -> None:
    wait = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    numbers: list[dict[str, str]] = [{"LOCAL_RANK": "1"}, {}, {"LOCAL_RANK": "0"}]
    plain = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    started = [subprocess.Popen(wait, env={**plain, **more}, stdout=subprocess.PIPE) for more in numbers]
    try:
        for process in started:  # before its program runs, a new process may not show its environment yet
            assert process.stdout is not None and process.stdout.readline() == b"\n"
        assert call_stacks.workers_of(os.getpid())[-2:] == [started[2].pid, started[0].pid]
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_waiting_for_missing_ranks_times_out() -> None:
    began = time.monotonic()
    with pytest.raises(call_stacks.CannotRead, match="not stuck within 1 s"):
        call_stacks.wait_until_stuck(os.getpid(), 2, "nothing.py", seconds=1)
    assert time.monotonic() - began < 10
