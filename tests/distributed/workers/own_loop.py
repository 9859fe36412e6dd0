"""Worker that runs the loop of ``notebooks/scripts/train_zero.py``, for ``test_readers_loop.py``.

It writes the losses of each start to ``losses.json`` in its run's directory.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence

from tutorial_lib.config import Config
from tutorial_lib.lab.scripts import train_zero
from tutorial_lib.launch import worker
from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory


def main(*arguments: str) -> None:
    worker.main(*arguments, train=train_all)


def train_all(configs: Sequence[Config]) -> None:
    for config in configs:
        losses = train_zero.train_loop({"config": config.to_json()})
        gc.collect()
        run = RunDirectory(config.directory)
        if Topology.from_environment(config.parallel).rank == 0:
            (run.path / "losses.json").write_text(json.dumps(losses))
            run.result_file.write_text("{}")  # the launcher expects a result of a run that has ended


if __name__ == "__main__":
    main(*sys.argv[1:])
