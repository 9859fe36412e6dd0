"""Runs: start one or several with the configured launcher, and wait until they end."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.config import Config
from tutorial_lib.launch import local
from tutorial_lib.launch.checks import check_together, preflight
from tutorial_lib.launch.environment import joined_rank
from tutorial_lib.launch.errors import OUTPUT_OF_A_RANK, WorkerError
from tutorial_lib.launch.watch import OnRows, Watcher, stop_on_signal
from tutorial_lib.records import Row, RunDirectory


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended.

    Attributes:
        config: the configuration that was run.
        result: content of ``result.json``.
        rows: rows of ``metrics.jsonl``, one per optimizer step.
        was_signalled: whether this process was asked to stop. The run may have completed all the same.
    """

    config: Config
    result: dict[str, Any]
    rows: list[Row]
    was_signalled: bool = False

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.config.directory)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, a notebook's Interrupt or a signal cut a launch short.

    It is a KeyboardInterrupt, so that neither a script nor *Run All* continues as if nothing had happened.

    Attributes:
        runs: the runs that had started; each has saved a checkpoint. Empty if no run had started, if a failed run
            waited for room on a Ray cluster to restart, and for a benchmark matrix or a SLURM job.
    """

    def __init__(self, message: str, runs: Sequence[Run]) -> None:
        super().__init__(message)
        self.runs = list(runs)


def warm_up(config: Config) -> None:
    """Start loading libraries for runs like this one in the background, so that the first run starts sooner.

    Args:
        config: a configuration whose launcher and device decide what to load. It is not checked, so it may still be
            incomplete.
    """
    if config.run.launcher == "local":
        local.warm_up(config.run.device)
    elif config.run.launcher == "ray":
        from tutorial_lib.launch.ray import cluster

        cluster.warm_up(config.run, config.parallel)


def run(config: Config, *, on_rows: OnRows | None = None) -> Run:
    """Start or resume a training run with the configured launcher, and wait until it ends.

    Raises:
        ConfigError: the configuration cannot run here. Usually this is noticed before any rank starts.
        WorkerError: a worker failed; the message holds its traceback, if it left one.
        Interrupted: Ctrl-C was pressed, or a signal came before the run started. A run that had started
            has saved a checkpoint.
    """
    return run_all([config], on_rows=on_rows)[0]


def reshape(source: Path, **flat: Any) -> Run:
    """Create a new run from another run's checkpoint, saved in a different shape by ranks of that shape.

    Training does not need this, because a run can resume in any shape. A reshape writes the checkpoint without training
    a step, and leaves the old run unchanged.

    Args:
        source: a run's directory (its newest checkpoint), or one checkpoint.
        flat: ``name`` of the new run, and settings that differ, as in
            :func:`tutorial_lib.checkpoint.reshape`.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: the settings cannot run or would change the updates, or a run of this name exists.
        WorkerError: a worker failed; there is no new run.
    """
    from tutorial_lib import checkpoint

    try:
        config = checkpoint.reshape(source, flat, run)
    except WorkerError as error:
        # The logs are gone together with the temporary directory of the attempt.
        raise WorkerError(str(error).partition(OUTPUT_OF_A_RANK)[0]) from error
    directory = RunDirectory(config.directory)
    return Run(config, directory.result(), directory.rows())


def run_all(configs: Sequence[Config], *, on_rows: OnRows | None = None, worker: str | None = None) -> list[Run]:
    """Run several configurations one after the other in the same processes, which then start only once.

    Args:
        configs: configurations with the same launcher, device and number of processes, and with different names.
        on_rows: called with new metrics rows.
        worker: module that each rank runs instead of the launcher's own, for ``launcher="local"``
            (:mod:`tutorial_lib.launch.worker`) or ``"ray"`` (:mod:`tutorial_lib.launch.ray.worker`).

    Raises:
        Interrupted: Ctrl-C was pressed, or a signal came before the last run had started. The current run, if any, has
            saved a checkpoint; the runs after it have not started.
    """
    first = configs[0]
    warm_up(first)
    if worker and first.run.launcher == "none":
        raise ValueError(
            f"worker={worker!r} is for processes that a launcher starts, but launcher='none' trains in this one. Write "
            "launcher='local' or 'ray', or leave worker out."
        )
    from tutorial_lib.checkpoint.lock import launch_lock

    configs = [preflight(config) for config in configs]
    check_together(configs)
    first = configs[0]
    rank = joined_rank(first.run, first.parallel)
    directories = [RunDirectory(config.directory) for config in configs]
    with ExitStack() as held:
        for directory in directories:
            held.enter_context(launch_lock(directory, rank or 0))
        signals: list[int] = []
        watched = Watcher(directories, on_rows, signals)
        earlier = [directory.result_version() for directory in directories]
        if rank is None:  # otherwise rank 0 does this when it trains
            for directory in directories:
                directory.clear_requests()
            held.enter_context(stop_on_signal(watched))
            for directory in directories:
                directory.create()
        try:
            if first.run.launcher == "ray":
                from tutorial_lib.launch.ray import train as ray_train

                ray_train.launch(configs, watched.poll, worker or ray_train.WORKER)
            elif first.run.launcher == "local":
                local.launch(configs, watched.poll, worker or local.WORKER)
            else:
                from tutorial_lib.launch.torchrun import launch as join

                begun = join(configs)
        except WorkerError as error:
            error.was_signalled = bool(signals)
            raise
        watched.poll()
    if first.run.launcher != "none":
        begun = sum(d.result_version() not in (None, before) for d, before in zip(directories, earlier, strict=True))
    ended = zip(configs[:begun], directories, strict=False)
    runs = [Run(config, directory.result(), directory.rows(), bool(signals)) for config, directory in ended]
    interrupted = signal.SIGINT in signals or any(r.result.get("stopped_by") == "SIGINT" for r in runs)
    if len(runs) < len(configs) or interrupted:
        raise Interrupted(_where_stopped(runs, configs), runs)
    return runs


def _where_stopped(runs: Sequence[Run], configs: Sequence[Config]) -> str:
    if not runs:
        return "stopped before training started; no step was run. Run it again to start or resume."
    last = runs[-1]
    not_begun = [config.run.name for config in configs[len(runs) :]]
    more = f"; not started: {', '.join(not_begun)}" if not_begun else ""
    if last.result["status"] == "completed":
        return f"run {last.config.run.name!r} had completed when the interrupt came{more}."
    where = f"stopped at step {last.result['step']} of {last.result['num_steps']} and was saved"
    return f"run {last.config.run.name!r} {where}{more}. Run it again to continue from there."
