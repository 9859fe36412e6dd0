"""Start the ranks as processes on this machine.

Processes are started and watched by ``torch.distributed.elastic.multiprocessing``, the part of ``torchrun`` that does
this. They find each other through a file instead of a port, and gloo talks over loopback: nothing outside this
machine can connect.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

from tutorial_lib.config import Config
from tutorial_lib.launch import _POLL_SECONDS, first_error
from tutorial_lib.records import RunDirectory


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
    ranks = range(world_size)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = str(max(1, (os.cpu_count() or 1) // world_size))
    context = start_processes(
        name="train",
        entrypoint=_worker,
        args={rank: (tuple(configs), f"file://{scratch / 'rendezvous'}") for rank in ranks},
        envs={
            rank: {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
                "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            }
            for rank in ranks
        },
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch / "logs"), redirects=Std.ALL),
    )
    try:
        outcome = None
        while outcome is None:
            outcome = context.wait(timeout=_POLL_SECONDS, period=_POLL_SECONDS / 2)
            poll()
        if outcome.is_failed():
            failure = min(outcome.failures.values(), key=lambda f: f.timestamp)
            raise first_error(
                directories,
                f"Rank {failure.local_rank} ended with exit code {failure.exitcode} and left no traceback"
                + (": it was killed, perhaps for memory." if failure.exitcode < 0 else ".")
                + f" The end of its output:\n{_tail(Path(outcome.stderrs[failure.local_rank]))}",
            )
    finally:
        context.close(timeout=10)
        for rank in ranks:
            _keep_output(scratch / "logs", rank, directories[-1].log_file(rank))
        shutil.rmtree(scratch, ignore_errors=True)


def _worker(configs: Sequence[Config], init_method: str) -> None:
    """What each process runs."""
    from tutorial_lib.launch.joined import process_group
    from tutorial_lib.trainer import train

    with process_group(configs[0], init_method):
        for config in configs:
            train(config)


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.is_file() else ""


def _keep_output(logs: Path, rank: int, target: Path) -> None:
    for name in ("stdout.log", "stderr.log"):
        for found in logs.rglob(f"{rank}/{name}"):
            with target.open("ab") as file:
                file.write(found.read_bytes())
