"""Inputs of a model: a batch where the model computes, without its labels."""

from __future__ import annotations

import torch
from torch import Tensor


def model_inputs(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return what the model takes of a batch, on its device. The labels are for the loss."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if name != "labels"}
