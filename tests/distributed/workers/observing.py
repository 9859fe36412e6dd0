"""Observing worker: the local launcher's worker, which also records each run's states, examples and files.

``python -m tests.distributed.workers.observing`` takes the place of ``python -m tutorial_lib.launch.worker`` and calls
it. At every checkpoint, it writes ``observed.pt`` in the run's directory, with full parameters, full optimizer states
and the examples of every step. A run's :class:`tests.distributed.observing.probe.Probe` has further instructions.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import pkgutil
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.distributed.observing.fsdp1_engine import FSDP1Engine
from tests.distributed.observing.gloo_averages import probe_averages
from tests.distributed.observing.probe import ERRORS, OBSERVATION, Probe
from tests.distributed.observing.watching import watching
from tests.support.late_writes import LateTrainer, LateTrainerWithoutSnapshot
from tutorial_lib import checkpoint
from tutorial_lib.config import Config
from tutorial_lib.dataloader import loaders
from tutorial_lib.engine import fsdp
from tutorial_lib.launch import worker
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer import Trainer, train

ENGINES = {"fsdp1": FSDP1Engine}


def main(*arguments: str) -> None:
    # The runs of a launch share a few data sets, each of which is read only once.
    read_once = mock.patch.object(loaders, "load_rows", functools.cache(loaders.load_rows))
    with read_once:
        worker.main(*arguments, train=train_all_observed)


def train_all_observed(configs: Sequence[Config]) -> None:
    for config in configs:
        probe_averages(Path(config.run.storage))
        train_observed(config, Probe.read(config))
        # The trainer collects garbage after every run. Objects that survive one collection are kept out of the next.
        gc.freeze()


def train_observed(config: Config, probe: Probe) -> None:
    """Train as the probe says, and write the observation. Collective."""
    if probe.start_twice or probe.late_writes:
        config = _train_to_the_stop(config, probe)
    with ExitStack() as patches:
        if probe.engine:
            patches.enter_context(mock.patch.object(fsdp, "FSDPEngine", ENGINES[probe.engine]))
        watch, kind = patches.enter_context(watching()), Trainer
        if probe.fault:
            kind = patches.enter_context(pkgutil.resolve_name(f"tests.distributed.injected.{probe.fault}")()) or Trainer
        trainer_class = watch.watched(kind)

        def observe(path: Path, row: dict[str, Any]) -> None:
            observation = watch.observation()
            if probe.load_nothing:
                observation["load_of_nothing"] = watch.load_of_nothing(config.directory / "nothing")
            if dist.get_rank() == 0:
                torch.save(observation, config.directory / OBSERVATION)

        if probe.must_fail:
            _expect_an_error(config, trainer_class)
        else:
            train(config, on_checkpoint=observe, trainer_class=trainer_class)


def _train_to_the_stop(config: Config, probe: Probe) -> Config:
    """Train a run until it stops, unobserved, and return the configuration of its second start. Collective."""
    if probe.late_writes:
        train(config, trainer_class=LateTrainerWithoutSnapshot if probe.no_snapshot else LateTrainer)
        if dist.get_rank() == 0:  # the checkpoint at the stop was written after training had ended
            shutil.rmtree(checkpoint.latest(RunDirectory(config.directory)))
        dist.barrier()
    else:
        train(config)
    return config.override(stop_after=None)


def _expect_an_error(config: Config, trainer_class: type[Trainer]) -> None:
    """Train a run, keep the error that each rank raises, and raise if there is none. Collective."""
    try:
        train(config, trainer_class=trainer_class)
    except Exception as error:
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, {"type": type(error).__name__, "message": str(error)})
        if dist.get_rank() == 0:
            (config.directory / ERRORS).write_text(json.dumps(errors))
            # The launcher expects a result from each finished run, and would blame a later run for this error.
            (config.directory / "result.json").write_text("{}")
            RunDirectory(config.directory).clear_errors()
    else:
        raise AssertionError(f"{config.run.name} was trained without an error")


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Exit as a forked rank does. Runs that must fail leave process groups behind, whose threads abort a normal exit.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
