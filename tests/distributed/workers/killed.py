"""Killed worker, for ``test_bench.py``: the local launcher's worker, whose last rank is killed in its second step."""

from __future__ import annotations

import functools
import os
import signal
import sys
from typing import Any

from tutorial_lib.launch import worker
from tutorial_lib.trainer import Trainer, train_all


class KilledTrainer(Trainer):
    """Trainer whose last rank is killed in the second step."""

    def train_step(self, micro_batches: list[dict[str, Any]]) -> None:
        if self.steps_done == 1 and self.topology.rank == self.topology.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().train_step(micro_batches)


def main(*arguments: str) -> None:
    worker.main(*arguments, train=functools.partial(train_all, trainer_class=KilledTrainer))


if __name__ == "__main__":
    main(*sys.argv[1:])
