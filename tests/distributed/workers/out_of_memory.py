"""Worker that runs out of memory, for ``test_bench.py``: in its second step, the last rank gets far too large a batch.

Its address space is limited first, as ``ulimit -v`` does, so that the allocator refuses at once and the machine never
comes under pressure.
"""

from __future__ import annotations

import resource
import sys
from typing import Any
from unittest import mock

import psutil
import torch.distributed as dist

from tutorial_lib.launch import worker
from tutorial_lib.trainer import loop

LEFT = 64 * 2**20
TIMES_THE_ROWS = 4096


def main(*arguments: str) -> None:
    train_step = loop.Trainer.train_step

    def too_large(self: loop.Trainer, micro_batches: Any) -> Any:
        if self.step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            micro_batches = [
                {key: value.repeat(TIMES_THE_ROWS, 1) for key, value in batch.items()} for batch in micro_batches
            ]
            limit = psutil.Process().memory_info().vms + LEFT
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return train_step(self, micro_batches)

    with mock.patch.object(loop.Trainer, "train_step", too_large):
        worker.main(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
