"""Model inputs: a batch without its labels, on the model's device."""

from __future__ import annotations

import torch
from torch import Tensor


def model_inputs(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the model's inputs from a batch, on its device. The labels are for the loss."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if name != "labels"}
