"""Rank of a launch: train one or several runs in the process group that the launcher has set up."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tutorial_lib.checkpoint.directory import clean_up_leftovers
from tutorial_lib.checkpoint.manager import OnCheckpoint
from tutorial_lib.checkpoint.start import opened_for_training
from tutorial_lib.checkpoint.storage import storage_failure
from tutorial_lib.config import Config, EngineConfig
from tutorial_lib.measure.memory_sampler import sample_memory
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import all_gather_ints, barrier
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer.loop import Trainer
from tutorial_lib.trainer.result import Result
from tutorial_lib.trainer.signals import output_to, stop_signals
from tutorial_lib.trainer.stops import STOP_AFTER


def train_all(
    configs: Sequence[Config], *, on_checkpoint: OnCheckpoint | None = None, trainer_class: type[Trainer] | None = None
) -> list[Result]:
    """Start or resume several runs one after the other, until the ranks are asked to stop. Collective.

    Args:
        configs: the runs to train.
        on_checkpoint: called for the last run only; see :func:`train`.
        trainer_class: see :func:`train`.

    Returns:
        The results of all runs that were started.
    """
    results: list[Result] = []
    with stop_signals() as stop_signalled:
        for config in configs:
            # A signal may have come after the last step of the run before, or to another rank, or to the launcher.
            if results and any(asked for (asked,) in all_gather_ints([int(_is_asked_to_stop(config, stop_signalled))])):
                break
            of_this = on_checkpoint if config is configs[-1] else None
            results.append(_train(config, of_this, trainer_class, stop_signalled))
            if results[-1].stopped_by not in (None, STOP_AFTER):
                break
    return results


def train(
    config: Config, *, on_checkpoint: OnCheckpoint | None = None, trainer_class: type[Trainer] | None = None
) -> Result:
    """Start or resume a training run in this process, as one rank of the existing process group. Collective.

    Every launcher calls this on every rank. Without a process group, the run has one rank.

    Args:
        config: what to run, with the values of its DeepSpeed file applied, from ``launch.preflight``.
        on_checkpoint: called on every rank when a checkpoint is complete.
        trainer_class: a subclass of :class:`Trainer`; default: the one for the configured engine.

    Raises:
        ConfigError: the configuration cannot run here, or another start of this run has not ended.
        CheckpointError: there are checkpoints, but none can be resumed.
        NonFiniteLoss: training diverged.
        RanksDisagree: ranks of a tensor-parallel group read different batches, or computed different losses.
    """
    with stop_signals() as stop_signalled:
        return _train(config, on_checkpoint, trainer_class, stop_signalled)


def _train(
    config: Config,
    on_checkpoint: OnCheckpoint | None,
    trainer_class: type[Trainer] | None,
    stop_signalled: Callable[[], int],
) -> Result:
    """Train a run as :func:`train` does. ``stop_signalled`` returns the number of a signal that has come, or 0."""
    started = time.perf_counter()
    topology, run = Topology.from_environment(config.parallel), RunDirectory(config.directory)
    with opened_for_training(run, topology):
        # Only torchrun's ranks clear old requests. Other launchers have already, and a new request may have come.
        if topology.rank == 0 and config.run.launcher == "none" and "RANK" in os.environ:
            run.clear_requests()
        barrier()
        log = run.log_file(topology.rank) if config.run.launcher != "none" else None
        with output_to(log):
            try:
                with _logging_memory(run.memory_log(topology.rank), config.run.memory_log_seconds):
                    build = trainer_class or _trainer_class(config.engine)
                    trainer = build(config, topology, on_checkpoint=on_checkpoint, stop_signalled=stop_signalled)
                    try:
                        return trainer.fit(started)
                    finally:
                        trainer.close()
                        gc.collect()
            except BaseException as error:
                refused = storage_failure(run, error)
                with suppress(OSError):
                    if refused:
                        clean_up_leftovers(run)  # a partial checkpoint may have left no space to write the error
                    # If nothing can be written, the launcher still has the output that Python prints at the end.
                    run.write_error(topology.rank, refused or error)
                if refused:
                    raise refused from error
                raise


def _is_asked_to_stop(config: Config, stop_signalled: Callable[[], int]) -> bool:
    by_launcher = config.run.launcher != "none" and RunDirectory(config.directory).stop_file.exists()
    return by_launcher or stop_signalled() != 0


@contextmanager
def _logging_memory(log: Path, seconds: float | None) -> Iterator[None]:
    """Log this rank's memory every ``seconds`` while the block runs, in place of an earlier start's log."""
    if seconds is None:
        yield
        return
    log.unlink(missing_ok=True)
    with sample_memory(log, interval=seconds):
        yield


def _trainer_class(engine: EngineConfig) -> type[Trainer]:
    """Return the class that runs the training loop: this package's, or the Hugging Face Trainer's."""
    if engine.name != "trainer":
        return Trainer
    from tutorial_lib.trainer.huggingface import HuggingFaceRun  # loads transformers' Trainer and accelerate

    return HuggingFaceRun
