"""Act as the rank named in the environment (``--launcher none``): ``torchrun`` sets these variables.

RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from ``torchrun``, which under SLURM ``srun`` starts once
per node; nothing is set by hand. Without them, a run of one process is a process group of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from tempfile import TemporaryDirectory

import torch.distributed as dist

from tutorial_lib.config import Config, ConfigError

TIMEOUT = timedelta(minutes=10)
"""After this long without an answer from a peer, a collective fails instead of waiting on."""


def launch(configs: Sequence[Config]) -> int:
    """Run the configurations as one rank of a process group that somebody else has started.

    Returns:
        How many were begun: fewer than all if one was asked to stop.

    Raises:
        ConfigError: the launcher's environment variables are missing although several ranks are asked for.
    """
    from tutorial_lib.trainer import train_all

    world_size = configs[0].parallel.world_size
    with ExitStack() as stack:
        init_method = "env://"
        if "RANK" not in os.environ:
            if world_size > 1:
                raise ConfigError(
                    f"launcher='none' takes its rank from RANK, which is not set. Start {world_size} processes with "
                    f"`python -m torch.distributed.run --nproc_per_node {world_size} -m tutorial_lib train ...`, "
                    "or write launcher='local'."
                )
            # DeepSpeed reads LOCAL_RANK even when it runs alone; what an earlier shell left over is not meant.
            alone = {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
            # Nobody else has to reach this process.
            interface = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
            stack.enter_context(_environment({**alone, **interface}))
            init_method = f"file://{stack.enter_context(TemporaryDirectory())}/rendezvous"
        stack.enter_context(process_group(configs[0], init_method))
        return len(train_all(configs))


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for as long as the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def process_group(config: Config, init_method: str) -> Iterator[None]:
    """The default process group for as long as the block runs: gloo on CPUs; on GPUs NCCL, with gloo for objects."""
    from tutorial_lib.trainer.process import local_device

    device = local_device(config)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=init_method,
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        timeout=TIMEOUT,
        device_id=None if device.type == "cpu" else device,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
