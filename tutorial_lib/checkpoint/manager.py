"""Checkpoint manager: when a run saves, which checkpoint it resumes from, and which ones it keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutorial_lib.checkpoint.compatibility import DataIdentity, check_continues, identity, reads_data
from tutorial_lib.checkpoint.directory import clear_remains, directory_of, finish_deletions, newest_intact
from tutorial_lib.checkpoint.loader import load
from tutorial_lib.checkpoint.manifest import read_trainer_state
from tutorial_lib.checkpoint.retention import Pruner
from tutorial_lib.checkpoint.saver import Progress, Save, save
from tutorial_lib.checkpoint.writer import make_stager
from tutorial_lib.config import Config
from tutorial_lib.models.side_files import load_side_files
from tutorial_lib.mpu import Topology
from tutorial_lib.records import Row, RunDirectory

OnCheckpoint = Callable[[Path, Row], None]
"""Called on every rank when a checkpoint is complete, with its path and the newest metrics row."""

_LOG = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run, as one of its ranks sees them. At most one save is under way.

    Args:
        config: the run's settings; ``config.run`` says how often to save and what to keep.
        topology: this rank's place in the grid.
        data: returns the digests of the run's data; without, a resume does not notice that they have changed.
        on_checkpoint: called when a checkpoint is complete.

    Attributes:
        found: the intact checkpoint that this start resumes from, or None.
        left_out: newer checkpoints that are damaged.
        reads_data: whether this start trains or evaluates; a reshape does neither, and needs no data.
        saved_at: step of the newest complete checkpoint, or None.
        saves: what :meth:`Save.finish` returned for each save of this start.

    Raises:
        ConfigError: the run cannot resume from its checkpoint, because settings, model or data differ.
        CheckpointError: there are checkpoints, and none of them is intact.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        *,
        data: DataIdentity | None = None,
        on_checkpoint: OnCheckpoint | None = None,
    ) -> None:
        self.config, self.topology, self.on_checkpoint = config, topology, on_checkpoint
        self.run = RunDirectory(config.directory)
        if topology.rank == 0:
            clear_remains(self.run)
        self.found, self.left_out = newest_intact(self.run, topology)
        self.reads_data = reads_data(config, self.found)
        data = data if self.reads_data else None
        self._saved = read_trainer_state(self.found) if self.found else {}
        if self.found:
            check_continues(config, self.found, data)
        if topology.rank == 0:
            for each in self.left_out:
                _LOG.warning("Not resumed from %s: %s Going on from %s.", each.checkpoint, each.why, self.found)
        self.saved_at: int | None = None
        self.saves: list[dict[str, Any]] = []
        self._identity: dict[str, Any] = {}
        if topology.rank == 0:
            known = self._saved.get("identity", {}).get("data", {})
            self._identity = identity(config) | {"data": known | (data() if data else {})}
            self._side_files = load_side_files(config.model.name, trust_remote_code=config.model.trust_remote_code)
        self._pruner = Pruner(self.run, config, topology)
        self._stager = make_stager() if config.run.async_save else None
        self._under_way: tuple[Save, Row] | None = None

    def saved_num_steps(self) -> int:
        """Return the number of steps of the run that the checkpoint belongs to."""
        return int(self._saved["record"]["num_steps"])

    def restore(self, engine: Any, loader: Any) -> Progress | None:
        """Fill the engine, the loader and this rank's random states from the checkpoint found. Collective.

        Returns:
            What else was saved: step, schedule, the trainer's record. None if there is no checkpoint.
        """
        if self.found is None:
            return None
        progress = load(self.found, engine, self.config, self.topology)
        loader.load_state_dict(progress.loader)
        self.saved_at = progress.step
        self._pruner.mark_intact(self.found)
        return progress

    def is_due(self, step: int) -> bool:
        """Return whether ``checkpoint_every`` asks for a save after this step."""
        every = self.config.run.checkpoint_every
        return bool(every) and step % every == 0

    def save(self, progress: Progress, engine: Any, row: Row, *, and_train_on: bool) -> None:
        """Write a checkpoint, after the save under way. Collective.

        Args:
            progress: step, data position, schedule, record.
            engine: what is saved.
            row: the newest metrics row, for ``on_checkpoint``.
            and_train_on: more steps follow. With ``async_save`` they need not wait until the files are written.
        """
        self.finish()
        stager = self._stager if and_train_on else None
        side_files = self._side_files if self.topology.rank == 0 else None
        begun = save(self.run, engine, self.config, self.topology, progress, side_files, stager)
        self._under_way = begun, row
        if stager is None:
            self.finish()

    def is_saving(self) -> bool:
        """Return whether a save is under way."""
        return self._under_way is not None

    def is_written(self) -> bool:
        """Return whether a save is under way and this rank's files of it are complete.

        Raises:
            OSError: this rank's files could not be written.
        """
        return self._under_way is not None and self._under_way[0].is_written()

    def finish(self) -> None:
        """Make the save under way visible, if there is one. Collective; waits for all ranks' files."""
        if self._under_way is None:
            return
        begun, row = self._under_way
        self.saves.append(begun.finish())
        self._under_way, self.saved_at = None, begun.step
        path = directory_of(self.run, begun.step)
        if self.on_checkpoint:
            self.on_checkpoint(path, row)
        self._pruner.prune(path)

    def identity(self) -> dict[str, Any]:
        """Return what model, tokenizer and data are, for :class:`Progress`; empty on all ranks but rank 0."""
        return self._identity

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        return None if self.saved_at is None else directory_of(self.run, self.saved_at)

    def close(self) -> None:
        """Release what outlives this object. A save that is not finished stays invisible; deletions are waited for."""
        if self._under_way:
            self._under_way[0].abandon()
        if self._stager:
            self._stager.close()
        finish_deletions()
