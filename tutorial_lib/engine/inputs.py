"""Model inputs: a batch without its labels, on the model's device."""

from __future__ import annotations

import torch
from torch import Tensor


def model_inputs(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch on the model's device, without the labels, which only the loss needs."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if name != "labels"}
