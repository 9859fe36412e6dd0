"""Worker that runs out of memory, for ``test_bench.py``: in its second step, the last rank gets far too large a batch.

The rank's address space is limited first, as by ``ulimit -v``, so that the allocator refuses at once and the machine
itself never runs out of memory.
"""

from __future__ import annotations

import functools
import resource
import sys
from typing import Any

import psutil

from tutorial_lib.launch import worker
from tutorial_lib.trainer import Trainer, train_all

LEFT = 64 * 2**20
TIMES_THE_ROWS = 4096


class GreedyTrainer(Trainer):
    """Trainer whose last rank repeats the rows of its second step many times."""

    def train_step(self, micro_batches: list[dict[str, Any]]) -> None:
        if self.steps_done == 1 and self.topology.rank == self.topology.world_size - 1:
            micro_batches = [
                {key: value.repeat(TIMES_THE_ROWS, 1) for key, value in batch.items()} for batch in micro_batches
            ]
            limit = psutil.Process().memory_info().vms + LEFT
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        super().train_step(micro_batches)


def main(*arguments: str) -> None:
    worker.main(*arguments, train=functools.partial(train_all, trainer_class=GreedyTrainer))


if __name__ == "__main__":
    main(*sys.argv[1:])
