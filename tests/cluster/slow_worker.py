"""Slow Ray worker: the launcher's worker with pauses after checkpoints, in which a node can be lost or come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray.train

from tests.cluster.ray_program import HELD_AT, IS_BACK
from tutorial_lib.config import Config
from tutorial_lib.launch.ray import worker
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer import train_all


def main(given: dict[str, Any]) -> None:
    all_ranks = Config.from_json(given["configs"][0]).parallel.world_size
    lacks_ranks = ray.train.get_context().get_world_size() < all_ranks

    def train(configs: Sequence[Config], on_checkpoint: Callable[[Path, dict[str, Any]], None]) -> None:
        (config,) = configs
        has_lost_a_node = bool(RunDirectory(config.directory).restarts())

        def report_and_wait(path: Path, row: dict[str, Any]) -> None:
            on_checkpoint(path, row)
            if not has_lost_a_node and row["step"] >= HELD_AT:
                time.sleep(1000)  # a node is about to be lost
            if lacks_ranks:
                until = time.monotonic() + 100
                while not (config.directory / IS_BACK).exists() and time.monotonic() < until:
                    time.sleep(0.1)
                time.sleep(1.5)  # there is room for all ranks again: give Ray time to notice

        train_all(configs, on_checkpoint=report_and_wait)

    worker.main(given, train)
