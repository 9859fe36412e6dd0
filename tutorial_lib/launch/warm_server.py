"""Warm server: a process with everything imported, from which the local launcher forks its ranks.

Importing torch, transformers and DeepSpeed takes seconds; a training run of a few steps takes one. So the process that
launches keeps one server beside it. The server imports everything once and then only waits: it runs no torch operation
and no tokenizer, because the threads of OpenMP, autograd and tokenizers do not survive a fork. Each run gets new
processes, forked from here, and nothing is reused after a run.

The two sides talk through a socket pair in pickled messages. The launching process sends ``("start", Job)`` and
``("signal", number)``; the server answers ``("started",)`` and, for each rank, ``("ended", rank, exit code, time)``.
When the launching process is gone, the socket closes: the server then asks its ranks to save and stop, waits for them,
and ends.

The launcher starts it with ``python -m tutorial_lib.launch.warm_server PID DESCRIPTOR warm|cold``: its own process id,
and the server's end of the socket pair. A *cold* server imports nothing and starts each rank as a new interpreter.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

MODULES = (
    "tutorial_lib.launch.worker",
    "tutorial_lib.torch_engine",
    "tutorial_lib.fsdp",
    "tutorial_lib.engine",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.utils.pin_memory",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "qwen2", "bloom")),
    *(f"transformers.models.{name}.tokenization_{name}" for name in ("gpt2", "qwen2")),
)
"""What a warm server imports. What these import inside functions is imported by each rank that needs it."""

_PARENT_CHECK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """The ranks of one launch.

    Attributes:
        module: has a ``main`` that takes ``arguments``, and is a program for ``python -m`` as well.
        arguments: the same for every rank.
        environments: each rank's whole environment.
        outputs: the file that takes each rank's standard output and standard error.
        directory: the working directory.
        path: the launching process's ``sys.path``.
    """

    module: str
    arguments: tuple[str, ...]
    environments: tuple[dict[str, str], ...]
    outputs: tuple[str, ...]
    directory: str
    path: tuple[str, ...]


def main(launcher_pid: str, descriptor: str, temperature: str) -> None:
    """Serve the launching process until it is gone."""
    launcher = int(launcher_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(descriptor))
    with _ending_with(launcher):
        can_fork = temperature == "warm" and import_everything()
    ranks: dict[int, ForkProcess] = {}

    def pass_on(number: int, _frame: Any) -> None:
        # A scheduler may signal every process of a job. The ranks save and stop; this one tells how they ended.
        _signal(ranks.values(), number)
        if not ranks:
            sys.exit()

    signal.signal(signal.SIGTERM, pass_on)
    while True:
        sentinels = {process.sentinel: rank for rank, process in ranks.items()}
        ready = wait([connection, *sentinels], timeout=_PARENT_CHECK_SECONDS)
        for sentinel in ready:
            if sentinel is not connection:
                rank = sentinels[sentinel]  # type: ignore[index]
                process = ranks.pop(rank)
                process.join()
                with suppress(OSError):  # a launcher that is gone is noticed below
                    connection.send(("ended", rank, process.exitcode, time.time()))
        try:
            if connection.poll():
                kind, content = connection.recv()
                if kind == "start":
                    ranks = _start(content, connection, can_fork)
                    connection.send(("started",))
                else:
                    _signal(ranks.values(), content)
                continue
        except (EOFError, OSError):
            break
        if os.getppid() != launcher:  # somebody the launcher forked still holds its end of the socket
            break
    _signal(ranks.values(), signal.SIGTERM)
    for process in ranks.values():
        process.join()


@contextmanager
def _ending_with(launcher: int) -> Iterator[None]:
    """End this process soon after the launching one, although it is busy importing and reads no messages."""

    def check(*_: Any) -> None:
        if os.getppid() != launcher:
            os._exit(1)

    signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, _PARENT_CHECK_SECONDS, _PARENT_CHECK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def import_everything() -> bool:
    """Import what ranks need. Returns whether they can be forked from this process."""
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
    import_modules(MODULES)
    with suppress(ImportError):
        # What libraries work out on first use, and ranks can share: a thousand regular expressions for the names of
        # weights, and which of DeepSpeed's operators can be built here.
        conversion_mapping = importlib.import_module("transformers.conversion_mapping")
        conversion_mapping.get_checkpoint_conversion_mapping("gpt2")
        _ = importlib.import_module("deepspeed.ops").__compatible_ops__
    torch = sys.modules.get("torch")
    # A GPU context does not survive a fork.
    return torch is None or not torch.cuda.is_initialized()


def import_modules(names: Iterable[str]) -> None:
    """Import modules for processes that are forked from this one."""
    for name in names:
        # A rank that needs a missing module fails with its own traceback; the others do without it.
        with suppress(ImportError):
            importlib.import_module(name)
    # Keep the collector from touching, and so copying, the pages that all ranks share.
    gc.collect()
    gc.freeze()


def _signal(ranks: Any, number: int) -> None:
    for process in list(ranks):
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _start(job: Job, connection: Connection, can_fork: bool) -> dict[int, ForkProcess]:
    context = multiprocessing.get_context("fork")
    become = _run_module if can_fork else _replace_process
    ranks = {
        rank: context.Process(target=_be_rank, args=(job, rank, connection, become))
        for rank in range(len(job.environments))
    }
    for process in ranks.values():
        process.start()
    return ranks


def _be_rank(job: Job, rank: int, connection: Connection, become: Any) -> None:
    """Turn this forked process into a rank: its environment, output, directory, and then its program."""
    connection.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    output = os.open(job.outputs[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    os.environ.clear()
    os.environ.update(job.environments[rank])
    os.chdir(job.directory)
    become(job)


def _run_module(job: Job) -> None:
    """Call the program's ``main`` in this process, set up as a new interpreter would be."""
    sys.path[:] = job.path
    sys.argv = [job.module, *job.arguments]
    if "torch" in sys.modules:
        # torch reads this variable when it is imported, which was before the fork.
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    importlib.import_module(job.module).main(*job.arguments)


def _replace_process(job: Job) -> None:
    os.execv(sys.executable, [sys.executable, "-m", job.module, *job.arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
