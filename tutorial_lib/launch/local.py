"""Start the ranks as processes on this machine.

Processes are started and watched by ``torch.distributed.elastic.multiprocessing``, the part of ``torchrun`` that does
this. They find each other through a file instead of a port, and gloo talks over loopback: nothing outside this
machine can connect.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

from tutorial_lib.config import Config
from tutorial_lib.doctor import usable_cores
from tutorial_lib.launch import _POLL_SECONDS, WorkerError, first_error, next_start
from tutorial_lib.records import RunDirectory

_FATAL = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""A rank that one of these has ended could not say why; what its peers then write is the consequence."""


def launch(configs: Sequence[Config], poll: Callable[[], None]) -> None:
    """Run the configurations one after the other on ``dp x tp`` new processes.

    Raises:
        WorkerError: a rank failed; all are gone when this is raised.
    """
    world_size = configs[0].parallel.world_size
    directories = [RunDirectory(config.directory) for config in configs]
    for directory in directories:
        directory.create()
        directory.clear_requests()
    scratch = Path(tempfile.mkdtemp(prefix="tutorial-lib-"))
    configs_file = scratch / "configs.json"
    configs_file.write_text(json.dumps([config.flat() for config in configs]))
    ranks = range(world_size)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = str(max(1, usable_cores() // world_size))
    arguments = ("-m", "tutorial_lib.launch.worker", str(configs_file), str(scratch / "rendezvous"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    context = start_processes(
        name="train",
        entrypoint=sys.executable,
        args=dict.fromkeys(ranks, arguments),
        envs={
            rank: {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
                "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
                "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo"),
            }
            for rank in ranks
        },
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch / "logs"), redirects=Std.ALL),
    )
    if threading.current_thread() is threading.main_thread():
        # torch has put its own in place, which would end the workers before they have saved.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        outcome = None
        while outcome is None:
            outcome = context.wait(timeout=_POLL_SECONDS, period=_POLL_SECONDS / 2)
            poll()
        if outcome.is_failed():
            failure = min(outcome.failures.values(), key=lambda f: (-f.exitcode not in _FATAL, f.timestamp))
            printed = Path(outcome.stderrs[failure.local_rank]).read_text(errors="replace").strip()
            silent = f"Rank {failure.local_rank} ended with exit code {failure.exitcode} and "
            if failure.exitcode > 0 and printed:
                silent += f"could not write why. It printed:\n{printed.splitlines()[-1]}\n\n{printed}"
            else:
                silent += (
                    "left no traceback"
                    + (": it was killed, perhaps for memory." if -failure.exitcode == signal.SIGKILL else ".")
                    + f" {next_start(directories)} The end of its output:\n"
                    + _last_output(failure.local_rank, printed, directories)
                )
            written = [record for directory in directories for record in directory.errors()]
            if -failure.exitcode in _FATAL and failure.local_rank not in {record["rank"] for record in written}:
                peers = [f"\n\nRank {r['rank']} failed with {r['type']}: {r['message']}" for r in written]
                raise WorkerError("".join([silent, *peers]))
            raise first_error(directories, silent)
    finally:
        context.close(timeout=10)
        shutil.rmtree(scratch, ignore_errors=True)


def _last_output(rank: int, printed: str, directories: Sequence[RunDirectory], lines: int = 20) -> str:
    """The end of what a rank wrote: into its newest run's log, and before and after its runs."""
    logs = [path for path in (directory.log_file(rank) for directory in directories) if path.is_file()]
    newest = max(logs, key=lambda log: log.stat().st_mtime, default=None)
    parts = [newest.read_text(errors="replace") if newest else "", printed]
    return "\n".join(line for part in parts for line in part.splitlines()[-lines:])
