"""Storage errors: a save that raises, a limit on file sizes, and a file system that becomes read-only."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.distributed.injected.killed import trainer_with_second_save_hook, trainer_with_second_write_hook
from tutorial_lib.checkpoint.manager import OnCheckpoint
from tutorial_lib.trainer import Trainer


@contextmanager
def save_raises() -> Iterator[type[Trainer]]:
    """Raise an error on rank 1 during the second save."""

    def fail() -> None:
        raise OSError("the disk is full")

    yield trainer_with_second_save_hook(fail)


@contextmanager
def limit_in_write() -> Iterator[type[Trainer]]:
    """Limit rank 1's files to 64 KiB before it writes the second checkpoint in the background, as under a quota."""
    small = (2**16, resource.RLIM_INFINITY)
    yield trainer_with_second_write_hook(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small))


@contextmanager
def read_only() -> Iterator[type[Trainer]]:
    """Make the directory of checkpoints read-only before the first start's second save (see ``small_storage.py``)."""

    class ReadOnly(Trainer):
        def build(self, on_checkpoint: OnCheckpoint | None) -> None:
            super().build(on_checkpoint)
            save, saves = self.checkpoints.save, []

            def saving(*given: Any, **named: Any) -> None:
                saves.append(given)
                done, checkpoints = self.run.path / "read-only", self.run.checkpoints
                if len(saves) == 2 and self.topology.rank == 0 and not done.exists():
                    done.write_text("")
                    subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
                    subprocess.run(["mount", "-o", "remount,bind,ro", checkpoints], check=True)
                save(*given, **named)

            self.checkpoints.save = saving  # type: ignore[method-assign]

    yield ReadOnly
