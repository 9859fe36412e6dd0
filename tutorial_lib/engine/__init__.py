"""Engines: plain PyTorch, DeepSpeed and FSDP2 behind one protocol."""

from __future__ import annotations

import os

import torch

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.engine.learning_rate import Schedule
from tutorial_lib.engine.protocol import Engine
from tutorial_lib.engine.trial_step import train_copy
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.device import local_device
from tutorial_lib.mpu.random_states import seed_everything

__all__ = ["Engine", "Schedule", "build_engine", "try_engine"]


def build_engine(config: Config, topology: Topology, num_steps: int) -> Engine:
    """Build the engine that the configuration names, ready to train: model, AdamW, learning-rate schedule, seeds.

    Args:
        config: what to run.
        topology: this rank's place in the grid. With more than one rank the process group must exist.
        num_steps: total number of optimizer steps of the run, for the schedule: ``loader.num_steps``.

    Raises:
        ConfigError: the configuration names the Hugging Face Trainer, which has its own loop; the values of the
            DeepSpeed file have not been applied to the configuration; this rank has no GPU; or the engine cannot train
            models of this family.
    """
    if config.engine.name == "trainer":
        raise ConfigError(
            "engine='trainer' is the Hugging Face Trainer, which has its own training loop: start it with "
            "`python -m tutorial_lib train --engine trainer`. For your own loop write engine='deepspeed', 'fsdp' or "
            "'torch'."
        )
    try_engine(config, topology, num_steps)
    return _build_for_training(config, topology, num_steps)


def try_engine(config: Config, topology: Topology, num_steps: int) -> None:
    """Refuse a model whose family the configured engine cannot train (see :mod:`tutorial_lib.engine.trial_step`)."""
    train_copy(config, lambda tiny: _build_for_training(tiny, topology, num_steps))


def _build_for_training(config: Config, topology: Topology, num_steps: int) -> Engine:
    seed_everything(config.run.seed)  # every rank draws the same weights
    engine = _build(config, topology, local_device(config.run))
    engine.schedule = Schedule(config.optimizer, engine.optimizer, num_steps)
    engine.train(True)
    # Ranks that read different data draw different dropout masks. A tensor-parallel group shares its masks.
    seed_everything(config.run.seed + 1 + topology.dp_rank)
    return engine


def _build(config: Config, topology: Topology, device: torch.device) -> Engine:
    if config.engine.name == "torch":
        from tutorial_lib.engine.single import TorchEngine

        return TorchEngine(config, topology, device)
    if config.engine.name == "fsdp":
        from tutorial_lib.engine.fsdp import FSDPEngine

        return FSDPEngine(config, topology, device)
    from tutorial_lib.engine.deepspeed.config import apply_file

    if apply_file(config) != config:
        raise ConfigError(
            f"deepspeed={config.engine.deepspeed_file!r} contains settings that this configuration does not have yet. "
            "Build the engine with the configuration that `tutorial_lib.launch.preflight(config)` returns."
        )
    # Otherwise DeepSpeed would use a GPU whenever there is one, even for a run on the CPU.
    os.environ["DS_ACCELERATOR"] = device.type
    from tutorial_lib.engine.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(config, topology, device)
