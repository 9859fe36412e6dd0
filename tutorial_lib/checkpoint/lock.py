"""Run locks: they keep a second start of a run out, and the kernel releases them when their process ends.

Each run has two locks. Its launching process holds ``.launch.lock``, from before its workers start until they are
gone. Rank 0 holds ``.lock`` while it trains, because workers may outlive a killed launcher, to finish a step and save.
A start that finds either lock held is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from filelock import FileLock, Timeout

from tutorial_lib.config import ConfigError
from tutorial_lib.files import lock_holder, write_lock_holder
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import broadcast_object
from tutorial_lib.records import RunDirectory

PREDECESSOR_SECONDS = 30
"""Seconds that a new rank 0 waits for the lock of a killed one, which the kernel may not have released yet."""


@contextmanager
def launch_lock(run: RunDirectory, rank: int = 0) -> Iterator[None]:
    """Keep out other starts of this run while the block runs. The launching process calls this.

    Args:
        run: the run.
        rank: the calling rank, if torchrun started the ranks; only rank 0 takes the lock.

    Raises:
        ConfigError: another start of the run has not ended. That start is not affected.
    """
    if rank != 0:
        yield
        return
    with _run_lock(run, ".launch.lock"):
        with _run_lock(run, ".lock"):  # workers of a launcher that was killed may still be saving
            pass
        yield


def check_free(run: RunDirectory, rank: int = 0) -> None:
    """Refuse a run that another process is launching or training right now.

    Raises:
        ConfigError: names the process.
    """
    with launch_lock(run, rank):
        pass


@contextmanager
def training_lock(run: RunDirectory, topology: Topology) -> Iterator[None]:
    """Hold the run's lock, on rank 0, while the block runs. Collective: all ranks learn whether rank 0 got it.

    Raises:
        ConfigError: another start of the run is training. Every rank raises.
    """
    with ExitStack() as held:
        refused = None
        if topology.rank == 0:
            try:
                held.enter_context(_run_lock(run, ".lock", PREDECESSOR_SECONDS))
            except ConfigError as error:
                refused = str(error)
        if refused := broadcast_object(refused):
            raise ConfigError(refused)
        yield


@contextmanager
def _run_lock(run: RunDirectory, name: str, seconds: float = 0) -> Iterator[None]:
    path = run.path / name
    # By default filelock falls back to a plain file, which a killed process would leave locked.
    lock = FileLock(path, timeout=seconds, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"Run {run.path.name!r} in {run.path.parent} is already running: {lock_holder(path)}. Wait until it "
            "ends, stop it, or give this run another name."
        ) from None
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s cannot be locked (%s): two starts of this run at the same time would not notice each other.",
            path,
            error.strerror or error,
        )
        yield
        return
    try:
        with suppress(OSError):  # if the disk is full, a later write will report it
            write_lock_holder(path)
        yield
    finally:
        with suppress(OSError):
            path.write_text("")
        lock.release()
