"""Ray workers that fail or are killed: each function takes the place of the one that trains in a Ray worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from tests.distributed.injected.killed import kill_this_rank
from tutorial_lib.launch.ray import train as ray_train
from tutorial_lib.trainer import loop as trainer


def fail(given: dict[str, Any]) -> None:
    """Train, but let rank 1 fail in its second step."""
    step = trainer.Trainer.train_step

    def failing(self: Any, micro_batches: Any) -> Any:
        if dist.get_rank() == 1 and self.step == 1:
            raise ValueError("of rank 1 alone")
        return step(self, micro_batches)

    with mock.patch.object(trainer.Trainer, "train_step", failing):
        ray_train._worker(given)


def be_killed_once(given: dict[str, Any]) -> None:
    """Train, but kill rank 1 when it reports its second checkpoint to Ray; the workers that replace it train on."""
    report, reports = ray_train.report, []
    done = Path(json.loads(given["configs"][-1])["storage"]) / "killed-on-ray"

    def reporting(row: dict[str, Any], path: Path) -> None:
        reports.append(path)
        if dist.get_rank() == 1 and len(reports) == 2 and not done.exists():
            done.write_text("")
            kill_this_rank()
        report(row, path)

    with mock.patch.object(ray_train, "report", reporting):
        ray_train._worker(given)
