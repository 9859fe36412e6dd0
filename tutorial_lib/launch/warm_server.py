"""Warm server: a process with everything imported, from which the local launcher forks its ranks.

Importing torch, transformers and DeepSpeed takes several seconds; a training run of a few steps takes one. So the
launching process keeps a server running. The server imports everything once and then only waits: it runs no torch
operation and no tokenizer, because the threads of OpenMP, autograd and tokenizers do not survive a fork. Each launch
gets new processes, forked from here and never reused.

The two sides exchange pickled messages through a socket pair. The launching process sends ``("start", Job)`` and
``("signal", number)``; the server answers ``("started",)`` and, for each rank, ``("ended", rank, exit code, time)``.
When the launching process ends, the socket closes: the server then asks its ranks to save and stop, waits for them,
and ends.

The launcher starts it with ``python -m tutorial_lib.launch.warm_server PID DESCRIPTOR [MODULE ...]``: its own process
id, the server's end of the socket pair, and the modules to import. A *cold* server imports nothing, and starts each
rank as a new interpreter.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

MODULES = (
    "tutorial_lib.launch.worker",
    "tutorial_lib.engine.single",
    "tutorial_lib.engine.fsdp",
    "tutorial_lib.engine.deepspeed.engine",
    "tutorial_lib.trainer.huggingface",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.utils.pin_memory",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "qwen2", "bloom")),
    *(f"transformers.models.{name}.tokenization_{name}" for name in ("gpt2", "qwen2")),
)
"""Modules that a warm server imports. Imports inside functions are left to the ranks."""

_PARENT_CHECK_SECONDS, _LOOK_SECONDS = 1.0, 0.1

_ORPHAN_SECONDS = 600
"""Seconds for ranks to save and stop when their launching process is gone."""

JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that schedulers send to every process of a job shortly before its time is up."""


@dataclass(frozen=True, slots=True)
class Job:
    """The ranks of one launch.

    Attributes:
        module: module with a ``main`` that takes ``arguments``; also a program for ``python -m``.
        arguments: arguments of ``main``, the same for every rank.
        environments: each rank's complete environment.
        outputs: file for each rank's standard output and standard error.
        directory: the working directory.
        path: the launching process's ``sys.path``.
    """

    module: str
    arguments: tuple[str, ...]
    environments: tuple[dict[str, str], ...]
    outputs: tuple[str, ...]
    directory: str
    path: tuple[str, ...]


def main(launcher_pid: str, descriptor: str, *modules: str) -> None:
    """Serve the launching process until it ends."""
    launcher = int(launcher_pid)
    ranks: dict[int, ForkProcess] = {}
    # A scheduler may signal every process of a job. The ranks save and stop; the server stays to report how they ended.
    for number in JOB_SIGNALS:
        signal.signal(number, lambda received, _frame: _signal(ranks.values(), received))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(descriptor))
    with exit_with_launcher(launcher):
        can_fork = bool(modules) and import_everything(modules)
    while os.getppid() == launcher:  # its end of the socket may outlive it, in another of its forks
        # A sentinel shows the end of a forked rank at once. New interpreters close theirs, and must be polled.
        sentinels = [process.sentinel for process in ranks.values()] if can_fork else []
        wait([connection, *sentinels], timeout=_PARENT_CHECK_SECONDS if can_fork else _LOOK_SECONDS)
        for rank, process in list(ranks.items()):
            if process.exitcode is not None:
                del ranks[rank]
                with suppress(OSError):  # if the launcher is gone, the loop notices it below
                    connection.send(("ended", rank, process.exitcode, time.time()))
        try:
            message: tuple[str, Any] = connection.recv() if connection.poll() else ("", None)
        except (EOFError, OSError):
            break
        kind, content = message
        if kind == "start":
            _start(content, connection, can_fork, ranks)
            connection.send(("started",))
        elif kind == "signal":
            _signal(ranks.values(), content)
    _signal(ranks.values(), signal.SIGTERM)
    end = time.monotonic() + _ORPHAN_SECONDS
    for process in ranks.values():
        process.join(max(0.0, end - time.monotonic()))
        process.kill()


@contextmanager
def exit_with_launcher(launcher: int) -> Iterator[None]:
    """Exit soon after the launching process ends, even while imports keep this process from reading messages."""

    def check(*_: Any) -> None:
        if os.getppid() != launcher:
            sys.exit(1)

    signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, _PARENT_CHECK_SECONDS, _PARENT_CHECK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def import_everything(modules: Sequence[str] = MODULES) -> bool:
    """Import the modules that ranks need, and return whether ranks can be forked from this process."""
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
    import_modules(modules)
    with suppress(Exception):
        # Fill caches that every rank would otherwise fill for itself: a thousand regular expressions for weight names,
        # and the list of DeepSpeed operators that can be built here.
        sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("gpt2")
        _ = sys.modules["deepspeed.ops"].__compatible_ops__
    torch = sys.modules.get("torch")
    # A GPU context does not survive a fork.
    return torch is None or not torch.cuda.is_initialized()


def import_modules(names: Iterable[str]) -> None:
    """Import modules for processes that are forked from this one."""
    for name in names:
        # A rank that needs a broken module fails with its own traceback; other ranks do not need it.
        with suppress(Exception):
            importlib.import_module(name)
    # Keep the garbage collector from touching, and so copying, the memory pages that all ranks share.
    gc.collect()
    gc.freeze()


def _signal(ranks: Any, number: int) -> None:
    for process in list(ranks):
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _start(job: Job, connection: Connection, can_fork: bool, ranks: dict[int, ForkProcess]) -> None:
    """Add the job's ranks to ``ranks`` as they start."""
    context = multiprocessing.get_context("fork")
    become = _run_module if can_fork else _replace_process
    # Without this, a signal could hit a rank that still has this process's signal handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        for rank in range(len(job.environments)):
            process = context.Process(target=_become_rank, args=(job, rank, connection, become, os.getpid()))
            process.start()
            ranks[rank] = process
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)


def _become_rank(job: Job, rank: int, connection: Connection, become: Any, server: int) -> None:
    """Turn this forked process into a rank: set its environment, output and directory, then run its program."""
    # If the server is killed, the run saves and stops. This survives an exec.
    signal_when_parent_ends(signal.SIGTERM)
    if os.getppid() != server:
        os._exit(1)
    connection.close()
    for number in (signal.SIGINT, *JOB_SIGNALS):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
    output = os.open(job.outputs[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    os.environ.clear()
    os.environ.update(job.environments[rank])
    os.chdir(job.directory)
    become(job)


def signal_when_parent_ends(number: signal.Signals) -> None:
    """Ask the kernel to send this process a signal when its parent ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def _run_module(job: Job) -> None:
    """Call the program's ``main`` in this process, set up like a new interpreter."""
    sys.path[:] = job.path
    sys.argv = [job.module, *job.arguments]
    use_threads_of_environment()
    importlib.import_module(job.module).main(*job.arguments)


def use_threads_of_environment() -> None:
    """Set torch's number of threads from ``OMP_NUM_THREADS``, which torch only read at import, before the fork."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if "torch" in sys.modules and threads.isdecimal():
        sys.modules["torch"].set_num_threads(int(threads))


def _replace_process(job: Job) -> None:
    # The package may only be importable with the launching process's own path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, job.path))
    os.execv(sys.executable, [sys.executable, "-m", job.module, *job.arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
