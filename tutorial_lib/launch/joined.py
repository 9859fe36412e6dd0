"""Join the process group that ``torchrun`` or ``srun`` has set up (``--launcher none``).

The launcher sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; nothing is set by hand here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from tutorial_lib.config import Config, ConfigError

TIMEOUT = timedelta(minutes=10)
"""After this long without an answer from a peer, a collective fails instead of waiting on."""


def launch(configs: Sequence[Config], poll: Callable[[], None]) -> None:
    """Run the configurations as one rank of a process group that somebody else has started.

    Raises:
        ConfigError: the launcher's environment variables are missing although several ranks are asked for.
    """
    from tutorial_lib.trainer import train

    world_size = configs[0].parallel.world_size
    if "RANK" not in os.environ:
        if world_size > 1:
            raise ConfigError(
                f"launcher='none' joins a process group, but RANK is not set. Start {world_size} processes with "
                f"`python -m torch.distributed.run --nproc_per_node {world_size} -m tutorial_lib train ...`, "
                "or write launcher='local'."
            )
        for config in configs:
            train(config)
        return
    with process_group(configs[0], "env://"):
        for config in configs:
            train(config)


@contextmanager
def process_group(config: Config, init_method: str) -> Iterator[None]:
    """The default process group for as long as the block runs: gloo on CPUs; on GPUs NCCL, with gloo for objects."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = None
    if config.run.device == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device is None else "cpu:gloo,cuda:nccl",
        init_method=init_method,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=TIMEOUT,
        device_id=device,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
