"""Checkpoint manager: decides when a run saves, which checkpoint it resumes from, and which ones it keeps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tutorial_lib.checkpoint.directory import directory_of, finish_deletions, step_of
from tutorial_lib.checkpoint.loader import load
from tutorial_lib.checkpoint.rank_writer import MakeWriter, Writer, make_stager
from tutorial_lib.checkpoint.retention import Pruner
from tutorial_lib.checkpoint.saver import Save, TrainingState, save
from tutorial_lib.checkpoint.start import Start, find_start, opened_for_training
from tutorial_lib.config import Config, ConfigError, RunConfig
from tutorial_lib.config.checks import check_warmup
from tutorial_lib.models.side_files import load_side_files
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import all_gather_ints
from tutorial_lib.mpu.random_states import seed_everything
from tutorial_lib.records import Row, RunDirectory

OnCheckpoint = Callable[[Path, Row], None]
"""Called on every rank when a checkpoint is complete, with its path and the metrics row of its step."""


class Loader(Protocol):
    """The part of a training loader that the manager uses."""

    @property
    def num_steps(self) -> int: ...
    @property
    def last_step(self) -> int: ...
    def state_at(self, step: int) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CheckpointManager:
    """Saves, restores and prunes a run's checkpoints, on every rank. At most one save is under way.

    Args:
        config: the run's settings; ``config.run`` says how often to save and what to keep.
        engine: the engine to save and restore, with its learning-rate schedule.
        loader: the loader whose position in the data is saved and restored.
        topology: this rank's place in the grid.
        start: where this start of the run begins, if the caller has found it and locked the run's directory. Otherwise
            the manager does both, and holds the lock until :meth:`close`.
        evaluate: returns the evaluation loss for ``keep_best``, or None if there is no time for it. Collective.
        on_checkpoint: called when a checkpoint is complete.
        make_writer: makes the writer of this rank's files for one save.

    Attributes:
        start: where this start of the run begins.
        saved_at: step of the newest complete checkpoint, or None.
        record: the training loop's own notes (JSON), saved with every checkpoint.
        reshaped_from: the shape that the run was saved in, if it resumed in a different one.
        saves: results of :meth:`Save.finish` for each save of this start.

    Raises:
        ConfigError: another start of the run has not ended; or the run cannot resume from its checkpoint, because
            settings, model or data differ; or it has done more steps than it should have; or ``keep_best`` has no
            ``evaluate``; or the warm-up outlasts the run.
        CheckpointError: there are checkpoints, but none is intact.
    """

    def __init__(
        self,
        config: Config,
        engine: Any,
        loader: Any,
        topology: Topology,
        *,
        start: Start | None = None,
        evaluate: Callable[[], float | None] | None = None,
        on_checkpoint: OnCheckpoint | None = None,
        make_writer: MakeWriter = Writer,
    ) -> None:
        self.config, self.engine, self.topology = config, engine, topology
        self.loader: Loader = loader
        self.evaluate, self.on_checkpoint, self.make_writer = evaluate, on_checkpoint, make_writer
        self.run = RunDirectory(config.directory)
        if config.run.keep_best and evaluate is None:
            raise ConfigError(
                "keep_best=True compares evaluation losses, but nothing evaluates: pass an evaluation function to "
                "CheckpointManager(..., evaluate=...), or write keep_best=False."
            )
        with ExitStack() as held:
            if start is None:
                held.enter_context(opened_for_training(self.run, topology))
                start = find_start(config, topology, lambda: {"train": loader.summary.sha256})
            self.start = start
            if start.found is None:
                check_warmup(config.optimizer.warmup_steps, self.loader.num_steps)
            else:
                _check_length(config.run, step_of(start.found), self.loader.num_steps)
            if topology.rank == 0:
                self._side_files = load_side_files(config.model.name, trust_remote_code=config.model.trust_remote_code)
            self._held = held.pop_all()
        self.saved_at: int | None = None
        self.record: dict[str, Any] = {}
        self.reshaped_from: dict[str, Any] | None = None
        self.saves: list[dict[str, Any]] = []
        self._pruner = Pruner(self.run, config.run, topology)
        self._stager = make_stager() if config.run.async_save else None
        self._under_way: tuple[Save, Row] | None = None

    def restore(self) -> int:
        """Restore this rank's engine, schedule, loader and random states from the newest intact checkpoint. Collective.

        Returns:
            Number of optimizer steps done so far: 0 if there is no checkpoint.
        """
        if self.start.found is None:
            return 0
        state = load(self.start.found, self.engine, self.config, self.topology)
        self.loader.load_state_dict(state.loader)
        self.engine.schedule.load_state_dict(state.scheduler)
        self.record, self.reshaped_from = state.record, state.reshaped_from
        if self.reshaped_from:
            # The random states that were saved belong to ranks that no longer exist.
            place = (self.config.run.seed, state.step, self.topology.dp_rank)
            seed_everything(int(np.random.SeedSequence(place).generate_state(1)[0]))
        self.saved_at = state.step
        self._pruner.mark_intact(self.start.found)
        return state.step

    def is_due(self, step: int) -> bool:
        """Return whether ``checkpoint_every`` asks for a save after this step."""
        every = self.config.run.checkpoint_every
        return bool(every) and step % every == 0

    def save_if_due(self, step: int, row: Row | None = None) -> Path | None:
        """Save after a step if ``checkpoint_every`` asks for it, or if it is the last step of this start. Collective.

        With ``async_save``, training continues while files are written, and a later call makes the checkpoint visible.

        Args:
            step: the step that was just trained.
            row: its metrics, for ``on_checkpoint``.

        Returns:
            The newest checkpoint if this call completed it, otherwise None.
        """
        before = self.saved_at
        self.finish_if_written()
        is_last = step >= self.loader.last_step
        if is_last or self.is_due(step):
            self.save(step, row, more_steps=not is_last)
        return self.newest() if self.saved_at != before else None

    def save(self, step: int, row: Row | None = None, *, more_steps: bool) -> None:
        """Write a checkpoint, once any save under way has finished. Collective.

        Args:
            step: the step that was just trained.
            row: its metrics, for ``on_checkpoint``.
            more_steps: whether more steps follow. With ``async_save`` they do not wait until the files are written.
        """
        self.finish()
        self.record.pop("eval_loss", None)
        self.record["num_steps"] = self.loader.num_steps
        if self.config.run.keep_best and self.evaluate and (loss := self.evaluate()) is not None:
            self.record["eval_loss"] = loss
        parts = self.loader.state_at(step), self.engine.schedule.state_dict(), self.record
        state = TrainingState(step, *parts, self.start.identity)
        stager = self._stager if more_steps else None
        side_files = self._side_files if self.topology.rank == 0 else None
        begun = save(self.run, self.engine, self.config, self.topology, state, side_files, stager, self.make_writer)
        self._under_way = begun, row or {}
        if stager is None:
            self.finish()

    def finish_if_written(self) -> None:
        """Make the save under way visible if all ranks' files are complete. Collective.

        Raises:
            OSError: this rank's files could not be written. Other ranks do not raise.
        """
        if self._under_way is None:
            return
        written = all_gather_ints([int(self._under_way[0].is_written())])
        if all(own for (own,) in written):
            self.finish()

    def finish(self) -> None:
        """Wait for all ranks' files, and make the save under way visible, if there is one. Collective."""
        if self._under_way is None:
            return
        begun, row = self._under_way
        self.saves.append(begun.finish())
        self._under_way, self.saved_at = None, begun.step
        path = directory_of(self.run, begun.step)
        if self.on_checkpoint:
            self.on_checkpoint(path, row)
        self._pruner.prune(path)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        return None if self.saved_at is None else directory_of(self.run, self.saved_at)

    def close(self) -> None:
        """Wait for deletions, and release locks and threads. An unfinished save stays invisible."""
        if self._under_way:
            self._under_way[0].abandon()
        if self._stager:
            self._stager.close()
        finish_deletions()
        self._held.close()


def _check_length(run: RunConfig, done: int, num_steps: int) -> None:
    """Refuse to shorten a run to fewer steps than it has done: they cannot be taken back."""
    if done > num_steps:
        given = f"steps={run.steps} is" if run.steps else f"epochs={run.epochs} makes {num_steps} steps,"
        raise ConfigError(
            f"{given} fewer than the {done} steps that run {run.name!r} has done. Write at least that many, or give "
            "the new run another name."
        )
