"""Device of one rank: the CPU, or the GPU of its local rank."""

from __future__ import annotations

import os

import torch

from tutorial_lib.config import ConfigError, RunConfig


def local_device(run: RunConfig) -> torch.device:
    """Return the device of this rank, and make it the current GPU. A rank that sees a single GPU uses that one.

    Raises:
        ConfigError: this process sees no GPU, or several but none for its local rank.
    """
    if run.device == "cpu":
        return torch.device("cpu")
    local_rank, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if not visible or local_rank >= visible > 1:
        raise ConfigError(
            f"Local rank {local_rank} has no GPU of its own: this process sees {visible}. Start no more ranks per node "
            "than it has GPUs, or write device='cpu'."
        )
    device = torch.device("cuda", local_rank if local_rank < visible else 0)
    torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Return the driver's name of a GPU, such as ``NVIDIA H200``, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
