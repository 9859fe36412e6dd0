"""Which checkpoints may go: older ones than the newest few, but for the best, and only while enough whole ones stay."""

from __future__ import annotations

from pathlib import Path

from tutorial_lib.checkpoint.files import (
    CheckpointError,
    agreed,
    barrier,
    checkpoints,
    damage,
    delete,
    read_trainer_state,
    step_of,
)
from tutorial_lib.config import Config
from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory


class Pruner:
    """Deletes a run's older checkpoints as ``keep_last`` and ``keep_best`` say.

    What is kept instead of something that is deleted has been read to its last byte before: by this start of the run,
    as it wrote it, or once by this object. A damaged checkpoint keeps nothing else from being kept.
    """

    def __init__(self, run: RunDirectory, config: Config, topology: Topology) -> None:
        self.run, self.settings, self.topology = run, config.run, topology
        self._whole: dict[str, bool] = {}

    def knows_whole(self, path: Path) -> None:
        """This checkpoint was just written or verified."""
        self._whole[path.name] = True

    def prune(self, newest: Path) -> list[str]:
        """Delete what is not kept. Collective; returns the names of what was deleted.

        Args:
            newest: the checkpoint that the run stands at. Later steps are another history: they neither count nor go.
        """
        if self.settings.keep_last is None:
            return []
        self.knows_whole(newest)
        # Rank 0 lists: on a network file system others may still see an older listing.
        found = agreed([path for path in checkpoints(self.run) if step_of(path) <= step_of(newest)])
        kept: list[Path] = []
        for path in reversed(found):
            if len(kept) < self.settings.keep_last and self._is_whole(path):
                kept.append(path)
        older = [path for path in found if path < kept[-1]]
        best = self._best(found) if self.settings.keep_best and older else None
        doomed = [path for path in older if path != best]
        if self.topology.rank == 0:
            for path in doomed:
                delete(path)
        barrier()
        return [path.name for path in doomed]

    def _is_whole(self, path: Path) -> bool:
        if path.name not in self._whole:
            try:
                self._whole[path.name] = damage(path, self.topology) is None
            except CheckpointError:
                self._whole[path.name] = False
        return self._whole[path.name]

    def _best(self, found: list[Path]) -> Path | None:
        by_loss = sorted(
            (loss, path) for path, loss in agreed(eval_losses(found) if self.topology.rank == 0 else {}).items()
        )
        return next((path for _, path in by_loss if self._is_whole(path)), None)


def eval_losses(found: list[Path]) -> dict[Path, float]:
    """The evaluation losses of those checkpoints that were evaluated and can be read."""
    losses = {}
    for path in found:
        try:
            loss = read_trainer_state(path)["record"].get("eval_loss")
        except CheckpointError:
            continue
        if loss is not None:
            losses[path] = loss
    return losses
