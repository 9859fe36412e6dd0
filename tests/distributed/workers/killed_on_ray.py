"""Killed Ray worker: the launcher's worker, except that rank 1 is killed when it reports its second checkpoint to Ray.

This happens only once, so the workers that Ray starts next train to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed.injected.killed import kill_this_rank
from tutorial_lib.config import Config
from tutorial_lib.launch.ray import worker
from tutorial_lib.trainer import train_all


def main(given: dict[str, Any]) -> None:
    worker.main(given, train_until_killed)


def train_until_killed(configs: Sequence[Config], on_checkpoint: Callable[[Path, dict[str, Any]], None]) -> None:
    done, reports = Path(configs[-1].run.storage) / "killed-on-ray", []

    def reporting(path: Path, row: dict[str, Any]) -> None:
        reports.append(path)
        if dist.get_rank() == 1 and len(reports) == 2 and not done.exists():
            done.write_text("")
            kill_this_rank()
        on_checkpoint(path, row)

    train_all(configs, on_checkpoint=reporting)
