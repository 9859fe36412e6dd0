"""Errors of the storage: a save that raises, a limit on file sizes, and a file system that turns read-only."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist

from tests.distributed.injected.killed import in_second_save, in_second_write
from tutorial_lib import checkpoint
from tutorial_lib.records import RunDirectory


@contextmanager
def save_raises() -> Iterator[None]:
    """Raise on rank 1 in the second checkpoint."""

    def fail() -> None:
        raise OSError("the disk is full")

    with in_second_save(fail):
        yield


@contextmanager
def limit_in_write() -> Iterator[None]:
    """Limit rank 1's files to 64 KiB before it writes the second checkpoint in the background, as under a quota."""
    with in_second_write(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))):
        yield


@contextmanager
def read_only() -> Iterator[None]:
    """Make the directory of checkpoints read-only before the second save, once; see ``faults/small_storage.py``."""
    save, saves = checkpoint.manager.save, []

    def saving(run: RunDirectory, *args: Any) -> Any:
        saves.append(run)
        done = run.path / "read-only"
        if len(saves) == 2 and dist.get_rank() == 0 and not done.exists():
            done.write_text("")
            subprocess.run(["mount", "--bind", run.checkpoints, run.checkpoints], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", run.checkpoints], check=True)
        return save(run, *args)

    with mock.patch.object(checkpoint.manager, "save", saving):
        yield
