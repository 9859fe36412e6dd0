"""Worker program of the Ray Train launcher: one rank of a run, in the process group that Ray Train has set up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tutorial_lib.config import Config
from tutorial_lib.launch.ray.capacity import resized
from tutorial_lib.launch.ray.report import report
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer import train_all


def main(given: dict[str, Any], train: Callable[..., object] = train_all) -> None:
    """Train the configurations one after the other, as a rank of the process group that Ray Train has set up.

    Args:
        given: the configurations in JSON, under ``configs``.
        train: called with the configurations for the ranks that Ray has room for, and with ``on_checkpoint``, which
            reports a complete checkpoint to Ray.
    """
    import ray.train

    from tutorial_lib.launch.torchrun import log_ranks
    from tutorial_lib.trainer.signals import output_to

    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    asked = [Config.from_json(text) for text in given["configs"]]
    configs = [resized(config, num_ranks // config.parallel.tp) for config in asked]
    directory = RunDirectory(configs[-1].directory)
    if rank == 0 and directory.restarts():
        directory.clear_errors()  # left by failed workers that these replace
    with output_to(directory.log_file(rank)):
        log_ranks(configs[-1].run, configs[-1].parallel)
    # Ray registers checkpoints under the directory of the run it was started for: the last one.
    train(configs, on_checkpoint=lambda path, row: report(row, path))
