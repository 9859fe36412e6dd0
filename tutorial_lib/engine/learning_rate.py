"""Learning-rate schedule: a warm-up, then a constant rate, or linear or cosine decay."""

from __future__ import annotations

from typing import Any

import torch
from transformers import get_scheduler

from tutorial_lib.config import OptimizerConfig


class Schedule:
    """The learning rate of an optimizer, step by step. Every engine's ``step()`` advances it after an update.

    Args:
        settings: peak rate, warm-up, and the kind of schedule after it.
        optimizer: the optimizer that uses the rate. All its parameter groups have the same rate.
        num_steps: total number of optimizer steps of the run.
    """

    def __init__(self, settings: OptimizerConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        self._groups = optimizer.param_groups
        self._scheduler = get_scheduler(settings.scheduler_name, optimizer, settings.warmup_steps, num_steps)

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        return float(self._scheduler.get_last_lr()[0])

    def step(self) -> None:
        """Advance to the next step's rate."""
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule, for a checkpoint."""
        return dict(self._scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position that any engine saved, even one with a different number of parameter groups."""
        per_group = ("base_lrs", "_last_lr", "lr_lambdas")
        self._scheduler.load_state_dict(state | {name: state[name][:1] * len(self._groups) for name in per_group})
        for group in self._groups:
            group["lr"] = self.rate
