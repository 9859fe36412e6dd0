"""Reader's loop for torchrun, with a kill: ``python -m tests.distributed.workers.killed_loop CONFIG [STEP]``.

It runs ``notebooks/scripts/train_zero.py``, and rank 0 adds each reported step to ``metrics.jsonl``. Rank 1 is killed
when it reports STEP, if one is given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from tests.distributed.injected.killed import kill_this_rank
from tutorial_lib.config import Config
from tutorial_lib.lab.scripts import train_zero
from tutorial_lib.records import RunDirectory


def main(config_file: str, killed_in: str = "0") -> None:
    config = Config.from_json(Path(config_file).read_text())
    run = RunDirectory(config.directory)

    def report(row: dict[str, Any], checkpoint: Path | None) -> None:
        if dist.get_rank() == 0:
            run.append(row)
        elif row["step"] == int(killed_in):
            kill_this_rank()

    with mock.patch.object(train_zero, "report", report):
        train_zero.main(config)


if __name__ == "__main__":
    main(*sys.argv[1:])
