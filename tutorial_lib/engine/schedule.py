"""Learning-rate schedule: a warm-up, then a constant rate, or one that falls along a line or a cosine."""

from __future__ import annotations

from typing import Any

import torch
from transformers import get_scheduler

from tutorial_lib.config import OptimizerConfig


class Schedule:
    """The learning rate of an optimizer, step by step. Every engine's ``step()`` moves it on after an update.

    Args:
        settings: the peak rate, the warm-up and what follows it.
        optimizer: what uses the rate. All its groups of parameters have the same one.
        num_steps: optimizer steps of the whole run.
    """

    def __init__(self, settings: OptimizerConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        self._groups = optimizer.param_groups
        self._scheduler = get_scheduler(settings.scheduler_name, optimizer, settings.warmup_steps, num_steps)

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        return float(self._scheduler.get_last_lr()[0])

    def step(self) -> None:
        """Move on to the next step's rate."""
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule, as a checkpoint keeps it."""
        return dict(self._scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that was saved, by any engine: how many groups it has depends on its meshes."""
        per_group = ("base_lrs", "_last_lr", "lr_lambdas")
        self._scheduler.load_state_dict(state | {name: state[name][:1] * len(self._groups) for name in per_group})
        for group in self._groups:
            group["lr"] = self.rate
