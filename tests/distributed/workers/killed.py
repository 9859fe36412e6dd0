"""Killed worker, for ``test_bench.py``: the local launcher's, but the last rank is killed in its second step."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any
from unittest import mock

import torch.distributed as dist

from tutorial_lib.launch import worker
from tutorial_lib.trainer import loop


def main(*arguments: str) -> None:
    train_step = loop.Trainer.train_step

    def killed(self: loop.Trainer, micro_batches: Any) -> Any:
        if self.step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, micro_batches)

    with mock.patch.object(loop.Trainer, "train_step", killed):
        worker.main(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
