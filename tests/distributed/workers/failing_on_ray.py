"""Failing Ray worker: the launcher's worker, except that rank 1 fails in its second step."""

from __future__ import annotations

import functools
from typing import Any

from tutorial_lib.launch.ray import worker
from tutorial_lib.trainer import Trainer, train_all


class FailingTrainer(Trainer):
    """Trainer that fails on rank 1 in the second step."""

    def train_step(self, micro_batches: list[dict[str, Any]]) -> None:
        if self.topology.rank == 1 and self.steps_done == 1:
            raise ValueError("of rank 1 alone")
        super().train_step(micro_batches)


def main(given: dict[str, Any]) -> None:
    worker.main(given, functools.partial(train_all, trainer_class=FailingTrainer))
