"""Rules for every test: no network, one thread per process, and no process left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
SEVERAL_PROCESSES_ON_FEW_CORES = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = str(Path(__file__).resolve().parents[1])
MARK, SESSION = "TUTORIAL_LIB_TEST_SESSION", uuid.uuid4().hex
GRACE_SECONDS = 20
"""Seconds for Ray's daemons and killed workers to end."""

# nbformat imports jsonschema, which imports this parser of IRIs (Unicode URLs). That takes 5 seconds in each pytest
# process, for a check that nothing here uses. Without the module, jsonschema skips the check.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
# Set at import, because torch reads its thread count when it is first imported; child processes inherit the mark.
os.environ.update(OFFLINE | SEVERAL_PROCESSES_ON_FEW_CORES | {MARK: SESSION})
# A shell's background jobs, and perhaps a CI's, ignore SIGINT, but tests interrupt themselves and their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Ranks import their programs from here, wherever pytest was started.
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, because each run in this process ends with a full one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def process_left_as_found() -> Iterator[None]:
    """Fail if a test file leaves a signal handler, an environment variable or the working directory changed.

    New variables do not count, because many libraries set some of their own when they are first imported.
    """
    before = _state_of_process()
    yield
    after = _state_of_process()
    changed = {name: (was, after.get(name)) for name, was in before.items() if after.get(name) != was}
    assert not changed, f"the tests of this file left changes behind (before, after): {changed}"


def _state_of_process() -> dict[str, object]:
    handlers = {number.name: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    return {**handlers, **os.environ, "PYTEST_CURRENT_TEST": "", "directory": os.getcwd()}


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Fail after the last test and fixture if a process that a test started is still running."""
    if nextitem is not None:
        return
    left = leftover_processes(GRACE_SECONDS)
    if left:
        described = [_describe(process) for process in left]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        pytest.fail("tests left processes behind (now killed):\n  " + "\n  ".join(described), pytrace=False)


def leftover_processes(grace: float) -> list[psutil.Process]:
    """Return processes of this session or its children that still run after ``grace`` seconds."""
    end = time.monotonic() + grace
    while (left := list(_started_by_this_session())) and time.monotonic() < end:
        time.sleep(0.2)
    return left


def _started_by_this_session() -> Iterator[psutil.Process]:
    children = set(psutil.Process().children(recursive=True))  # those that were forked carry no mark of their own
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            ours = process in children or process.environ().get(MARK) == SESSION
            if ours and not _ends_with_this_process(process):
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _ends_with_this_process(process: psutil.Process) -> bool:
    """Return whether this is the resource tracker or a launcher's warm server, but not a fork of a server."""
    command = " ".join(process.cmdline())
    helpers = ("multiprocessing.resource_tracker", "tutorial_lib.launch.warm_server", "tutorial_lib.launch.ray.server")
    return process.ppid() == os.getpid() and any(helper in command for helper in helpers)


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:160] or process.name()}"
    except psutil.NoSuchProcess:
        return f"{process.pid} (just gone)"
