"""Background writes made late on purpose, so that a missing snapshot shows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutorial_lib.checkpoint.manager import OnCheckpoint
from tutorial_lib.checkpoint.rank_writer import Writer
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer import Trainer

PATIENCE = 120
"""Seconds after which a test gives up waiting for a step."""


class LateTrainer(Trainer):
    """Trainer whose background writes wait for the step that follows the save.

    By then training has changed weights, moments, random states and the position in the data.
    """

    def build(self, on_checkpoint: OnCheckpoint | None) -> None:
        super().build(on_checkpoint)
        self.checkpoints.make_writer = self.make_writer

    def make_writer(self, root: Path, stager: Any) -> Writer:
        return LateWriter(root, stager, self.before_a_write)

    def before_a_write(self, step: int) -> None:
        """Act just before each background job of the save after ``step``."""


class LateWriter(Writer):
    """Writer whose background jobs wait until the step after the save is in the metrics.

    Args:
        root: the checkpoint's directory.
        stager: as for :class:`Writer`.
        then: called with the save's step just before each job.
    """

    def __init__(self, root: Path, stager: Any, then: Callable[[int], None]) -> None:
        super().__init__(root, stager)
        self._is_late, self._then = stager is not None, then
        self._records, self._saved_at = RunDirectory(root.parents[1]), int(root.name.split("-")[2])

    def submit(self, job: Callable[..., Any], *given: Any) -> None:
        super().submit(functools.partial(self._do_late, job) if self._is_late else job, *given)

    def _do_late(self, job: Callable[..., Any], *given: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._records.rows()[-1]["step"] <= self._saved_at:
            assert time.monotonic() < deadline, "training waited for the files"
            time.sleep(0.01)
        self._then(self._saved_at)
        job(*given)


class WithoutSnapshot(LateWriter):
    """Late writer of the states themselves, which training has changed by then."""

    def snapshot(self, states: dict[str, Any]) -> Any:
        return states


class LateTrainerWithoutSnapshot(LateTrainer):
    """Trainer whose late files hold the states of a later step."""

    def make_writer(self, root: Path, stager: Any) -> Writer:
        return WithoutSnapshot(root, stager, self.before_a_write)
