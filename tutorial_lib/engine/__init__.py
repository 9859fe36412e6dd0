"""Engines: plain PyTorch, DeepSpeed and FSDP2 behind one protocol."""

from __future__ import annotations

import os

import torch

from tutorial_lib.config import Config
from tutorial_lib.engine.protocol import Engine
from tutorial_lib.mpu import Topology

__all__ = ["Engine", "build_engine"]


def build_engine(config: Config, topology: Topology, device: torch.device) -> Engine:
    """The engine that the configuration names."""
    if config.engine.name == "torch":
        from tutorial_lib.engine.single import TorchEngine

        return TorchEngine(config, topology, device)
    if config.engine.name == "fsdp":
        from tutorial_lib.engine.fsdp import FSDPEngine

        return FSDPEngine(config, topology, device)
    # DeepSpeed would take a GPU that is there, also for a run that is to stay on the CPU.
    os.environ["DS_ACCELERATOR"] = device.type
    from tutorial_lib.engine.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(config, topology, device)
