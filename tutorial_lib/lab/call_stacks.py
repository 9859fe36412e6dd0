"""Stacks of running processes: the line of code where each rank of a hanging run waits.

Uses `py-spy <https://github.com/benfred/py-spy>`_, which reads a process's memory from outside, so the process needs no
preparation. The kernel allows this for root and, if ``kernel.yama.ptrace_scope`` is 0, for the process's own user.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

Stack = tuple[str, ...]
"""Calls of the main thread as ``FILE:LINE FUNCTION``, innermost first."""


class CannotRead(RuntimeError):
    """A stack cannot be read. The message says why."""


def workers_of(launcher: int) -> list[int]:
    """Return the process ids of the ranks that torchrun started, in the order of their local ranks."""
    found = {}
    for child in psutil.Process(launcher).children():
        try:
            found[int(child.environ()["LOCAL_RANK"])] = child.pid
        except (psutil.Error, KeyError):  # it has just ended, or it is not a rank
            continue
    return [found[rank] for rank in sorted(found)]


def read_stack(pid: int) -> Stack:
    """Read the stack of a process's main thread.

    Raises:
        CannotRead: py-spy is not installed, it may not read the process, or the process has ended.
    """
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        raise CannotRead("py-spy is not installed: pip install py-spy")
    try:
        done = subprocess.run(
            [program, "dump", "--json", "--pid", str(pid)], capture_output=True, text=True, timeout=20
        )
    except subprocess.TimeoutExpired:
        raise CannotRead(f"py-spy read nothing from process {pid} within 20 s") from None
    if done.returncode:
        raise CannotRead(f"py-spy cannot read process {pid}: {done.stderr.strip()}")
    threads = json.loads(done.stdout)  # the main one is last, and has no name until something imports threading
    main = next((each for each in threads if each["thread_name"] == "MainThread"), threads[-1])
    return tuple(f"{Path(each['filename']).name}:{each['line']} {each['name']}" for each in main["frames"])


def wait_until_stuck(launcher: int, num_ranks: int, script: str, *, seconds: float = 60) -> list[Stack]:
    """Wait until no rank has moved for a second, and return the stack of each rank.

    Args:
        launcher: process id of torchrun.
        num_ranks: number of ranks that it starts.
        script: file name of the script that the ranks run; a rank that is still importing does not count as stuck.
        seconds: give up after this long.

    Raises:
        CannotRead: a stack cannot be read, or the ranks kept moving.
    """
    before: list[Stack] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ranks = workers_of(launcher)
        now = [read_stack(pid) for pid in ranks] if len(ranks) == num_ranks else []
        if now and now == before and all(_is_inside(stack, script) for stack in now):
            return now
        before = now
        time.sleep(1)
    raise CannotRead(f"the ranks were not stuck within {seconds:.0f} s")


def _is_inside(stack: Stack, script: str) -> bool:
    """Return whether a rank is in a function of the script: at the script's top level it may still be importing."""
    return sum(call.startswith(f"{script}:") for call in stack) > 1
