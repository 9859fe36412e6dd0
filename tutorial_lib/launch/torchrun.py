"""Launcher for torchrun (``--launcher none``): run as the rank that the environment describes.

``torchrun`` sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; never set them by hand. Under SLURM,
``srun`` starts one ``torchrun`` per node. Without these variables, a run with one rank creates its own
process group.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from tempfile import TemporaryDirectory
from unittest import mock

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tutorial_lib.config import Config, ConfigError, ParallelConfig, RunConfig
from tutorial_lib.launch.connectivity import unreachable_rank
from tutorial_lib.launch.environment import addresses
from tutorial_lib.launch.errors import error_of_joined_rank
from tutorial_lib.records import RunDirectory
from tutorial_lib.tables import align

TIMEOUT = timedelta(minutes=10)
"""Time without an answer from a peer after which a collective fails instead of hanging."""

JOIN_TIMEOUT = timedelta(minutes=5)
"""Time that ranks wait for each other at the start: nodes may take minutes to load from a busy file system."""


_groups_of_deepspeed = False  # whether DeepSpeed keeps the groups of an earlier launch of this process


class RendezvousError(RuntimeError):
    """The ranks did not find each other. The message says why, as far as this rank can tell."""


def launch(configs: Sequence[Config]) -> int:
    """Run the configurations as one rank, of torchrun's process group or of its own.

    Returns:
        Number of configurations that were started: fewer than all if one was asked to stop.

    Raises:
        ConfigError: torchrun's environment variables are missing, although several ranks are needed; DeepSpeed would
            run in this process twice; or this rank refuses the configuration.
        WorkerError: a rank that torchrun started has failed; the message names the one that failed first.
    """
    began = time.time()
    try:
        return _train_joined(configs)
    except ConfigError:
        raise
    except Exception as error:  # the process group is gone, so ranks that waited for this one have failed as well
        if "RANK" not in os.environ:
            raise
        rank, num_ranks = int(os.environ["RANK"]), configs[0].parallel.world_size
        for directory in [RunDirectory(config.directory) for config in configs]:
            if any(record["rank"] == rank and record["time"] >= began for record in directory.errors()):
                raise error_of_joined_rank(directory, rank, num_ranks) from error
        raise


def _train_joined(configs: Sequence[Config]) -> int:
    from tutorial_lib.trainer import train_all

    global _groups_of_deepspeed
    if any(config.engine.name == "deepspeed" for config in configs):
        if _groups_of_deepspeed:
            raise ConfigError(
                "DeepSpeed keeps its process groups in global variables, so a process can run it only once with "
                "launcher='none', and this one has. Write launcher='local', or start another process."
            )
        _groups_of_deepspeed = True
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
            # DeepSpeed reads LOCAL_RANK even in a single process. Ignore one that is left over in the shell.
            alone = {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
            # No other process needs to reach this one.
            interface = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
            stack.enter_context(mock.patch.dict(os.environ, alone | interface))
            init_method = f"file://{stack.enter_context(TemporaryDirectory())}/rendezvous"
        stack.enter_context(process_group(configs[0].run, init_method))
        if "RANK" in os.environ:
            log_ranks(configs[0].run, configs[0].parallel)
        return len(train_all(configs))


@contextmanager
def process_group(run: RunConfig, init_method: str) -> Iterator[None]:
    """Provide the default process group while the block runs: gloo on CPUs; on GPUs NCCL, with gloo for objects.

    Raises:
        RendezvousError: the ranks did not find each other in time.
        ConfigError: two ranks use the same GPU, which NCCL refuses.
    """
    from tutorial_lib.mpu.device import local_device

    device = local_device(run)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        store, _, _ = next(rendezvous(init_method, rank, world_size, timeout=JOIN_TIMEOUT))
        store.set_timeout(JOIN_TIMEOUT)
        is_on_several_nodes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) < world_size
        if is_on_several_nodes and (problem := unreachable_rank(store, rank, world_size)):
            raise RendezvousError(problem)
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
            device_id=None if device.type == "cpu" else device,
        )
        store.set_timeout(TIMEOUT)
    except RendezvousError:
        raise
    except RuntimeError as error:  # most errors of torch.distributed are subclasses of it
        if shared := next((line for line in str(error).splitlines() if "Duplicate GPU" in line), None):
            raise ConfigError(
                f"Ranks share a GPU ({shared}). Start no more ranks per node than it has GPUs, and let each rank see "
                "all of them, or only its own."
            ) from error
        if init_method != "env://" or "NCCL error" in str(error):
            raise
        raise RendezvousError(_explain_rendezvous(error)) from error
    try:
        yield
    except BaseException:
        if device.type == "cpu":
            dist.destroy_process_group()
        else:  # NCCL would first wait for the other ranks, and they may wait for this one in a collective
            dist.distributed_c10d._abort_process_group()
        raise
    dist.destroy_process_group()


def _explain_rendezvous(error: RuntimeError) -> str:
    """Explain why the ranks that the environment describes did not find each other."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    rank, world_size, host, port = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    who = f"Rank {rank} of {world_size}, on {socket.gethostname()},"
    if "gloo" in said.lower() or "mesh" in said.lower():
        chosen = os.environ.get("GLOO_SOCKET_IFNAME")
        why = (
            f"{who} met the others at {host}:{port}, but gloo could not connect it to each of them. It used "
            + (f"GLOO_SOCKET_IFNAME={chosen}" if chosen else "the address of its host name")
            + ". Set GLOO_SOCKET_IFNAME to the interface of the network between the nodes; this node has "
            + ", ".join(f"{name} ({address})" for name, address in addresses())
            + "."
        )
    elif "EADDRINUSE" in said:
        why = (
            f"{who} cannot wait for the others at {host}:{port}: another program is using the port. Choose another "
            "port, or end that program."
        )
    elif not _resolves(host):
        why = (
            f"{who} cannot resolve the name {host!r} of the node where all ranks meet. Every node must resolve it: "
            f"`getent hosts {host}` has to print an address."
        )
    else:
        why = (
            f"{who} waited {JOIN_TIMEOUT.total_seconds():.0f} s at {host}:{port}, but not all of the others arrived. "
            "Look for ranks that failed before, or were not started. If RANK and WORLD_SIZE were exported by hand, "
            "unset them: torchrun sets them for each rank that it starts."
        )
    return f"{why} ({said})"


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):  # UnicodeError: no host can have this name
        return False
    return True


def log_ranks(run: RunConfig, parallel: ParallelConfig) -> None:
    """Print on rank 0 where the ranks met, and each one's node and device. Collective."""
    from tutorial_lib.mpu import Topology
    from tutorial_lib.mpu.collectives import all_gather_objects
    from tutorial_lib.mpu.device import local_device

    own = (socket.gethostname(), os.environ["LOCAL_RANK"], str(local_device(run)))
    places = all_gather_objects(own)
    if dist.get_rank() != 0:
        return
    rows = [("rank", "dp", "tp", "node", "local rank", "device")]
    for rank, (host, local_rank, device) in enumerate(places):
        place = Topology(parallel.dp, parallel.tp, rank)
        rows.append((str(rank), str(place.dp_rank), str(place.tp_rank), host, local_rank, device))
    hosts = len({host for host, _, _ in places})
    identity = os.environ.get("TORCHELASTIC_RUN_ID")
    backend = dist.get_backend()
    interface = f"{'NCCL' if 'nccl' in backend else 'GLOO'}_SOCKET_IFNAME"
    print(
        f"{len(places)} rank{'s' * (len(places) > 1)} on {hosts} node{'s' * (hosts > 1)} met at "
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        + (f", rendezvous id {identity}" if identity else "")
        + f"; {backend} over {os.environ.get(interface, 'the addresses of the host names')}",
        *align(rows, (True, True, True, False, True, False), least=(6, 4, 4, 20, 10, 0), gaps=[" "] * 5),
        sep="\n",
        file=sys.stderr,
        flush=True,
    )
