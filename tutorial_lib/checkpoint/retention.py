"""Retention of checkpoints: the newest intact ones and the best one stay, and older ones are deleted."""

from __future__ import annotations

from pathlib import Path

from tutorial_lib.checkpoint.directory import checkpoints, delete, step_of
from tutorial_lib.checkpoint.manifest import (
    CheckpointError,
    NewerFormat,
    Unreadable,
    damage,
    damage_by_size,
    read_trainer_state,
)
from tutorial_lib.config import RunConfig
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import broadcast_object
from tutorial_lib.records import RunDirectory

_MAY_BE_INTACT = (NewerFormat, Unreadable)


class Pruner:
    """Deletes a run's older checkpoints, according to ``keep_last`` and ``keep_best``.

    A checkpoint only counts towards ``keep_last`` if this start wrote and hashed it, or read every byte of it. Damaged
    ones do not count. Neither do checkpoints that cannot be read right now or that a newer version wrote, but those are
    never deleted.
    """

    def __init__(self, run: RunDirectory, settings: RunConfig, topology: Topology) -> None:
        self.run, self.settings, self.topology = run, settings, topology
        self._damage: dict[str, CheckpointError | None] = {}

    def mark_intact(self, path: Path) -> None:
        """Record that a checkpoint was just written or verified."""
        self._damage[path.name] = None

    def prune(self, newest: Path) -> list[str]:
        """Delete checkpoints that need not be kept, and return their names. Collective.

        Args:
            newest: the run's current checkpoint. Those of later steps were saved before the run went back to an earlier
                one: they are neither counted nor deleted.
        """
        if self.settings.keep_last is None:
            return []
        self.mark_intact(newest)
        # All ranks use rank 0's listing: on a network file system, others may still see an older one.
        found = broadcast_object([path for path in checkpoints(self.run) if step_of(path) <= step_of(newest)])
        kept: list[Path] = []
        for path in reversed(found):
            if len(kept) < self.settings.keep_last and self._is_intact(path):
                kept.append(path)
        if len(kept) < self.settings.keep_last:
            return []
        older = [path for path in found if path < kept[-1]]
        best = self._best(found) if self.settings.keep_best and older else None
        doomed = []
        if self.topology.rank == 0:
            doomed = [path for path in older if path != best and not self._may_be_needed(path)]
            for path in doomed:
                delete(path)
        doomed = broadcast_object(doomed)
        return [path.name for path in doomed]

    def _is_intact(self, path: Path) -> bool:
        """Return whether a checkpoint is intact, with the same answer on every rank. Collective."""
        if path.name not in self._damage or isinstance(self._damage[path.name], _MAY_BE_INTACT):
            self._damage[path.name] = damage(path, self.topology)
        return self._damage[path.name] is None

    def _may_be_needed(self, path: Path) -> bool:
        found = self._damage[path.name] if path.name in self._damage else damage_by_size(path)
        return isinstance(found, _MAY_BE_INTACT)

    def _best(self, found: list[Path]) -> Path | None:
        by_loss = sorted(
            (loss, path)
            for path, loss in broadcast_object(eval_losses(found) if self.topology.rank == 0 else {}).items()
        )
        return next((path for _, path in by_loss if self._is_intact(path)), None)


def eval_losses(found: list[Path]) -> dict[Path, float]:
    """Return the evaluation losses of all checkpoints that were evaluated and can be read."""
    losses = {}
    for path in found:
        try:
            loss = read_trainer_state(path)["record"].get("eval_loss")
        except CheckpointError:
            continue
        if loss is not None:
            losses[path] = loss
    return losses
