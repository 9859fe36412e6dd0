"""Environment variables of torchrun and Ray, which determine how a run is started.

Only ``launcher='none'`` uses torchrun's variables. The other launchers start their own ranks. They ignore a ``RANK``
that is left over in a shell, but refuse to start if ``TORCHELASTIC_RUN_ID`` is set as well.
"""

from __future__ import annotations

import os
import socket

from tutorial_lib.config import ConfigError, ParallelConfig, RunConfig

RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets for each rank, and that a rank needs."""


def joined_rank(run: RunConfig, parallel: ParallelConfig) -> int | None:
    """Return this process's rank if torchrun started it, or None if it starts the run itself.

    Raises:
        ConfigError: see :func:`check_environment`.
    """
    if run.launcher != "none" or "RANK" not in os.environ:
        return None
    check_environment(run, parallel)
    return int(os.environ["RANK"])


def is_under_torchrun(run: RunConfig, parallel: ParallelConfig) -> bool:
    """Return whether torchrun watches this process's exit code."""
    return joined_rank(run, parallel) is not None and "TORCHELASTIC_RUN_ID" in os.environ


def ray_address() -> str | None:
    """Return the cluster in ``RAY_ADDRESS``, or None if Ray is started on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def check_environment(run: RunConfig, parallel: ParallelConfig) -> None:
    """Refuse environment variables that contradict the configuration or cannot work.

    Raises:
        ConfigError: torchrun has started this process, but the launcher would start all ranks again; a variable of
            torchrun is missing, is out of range, or contradicts dp x tp; ``GLOO_SOCKET_IFNAME`` is not a network
            interface; or it or ``NCCL_SOCKET_IFNAME`` is one that other nodes cannot reach.
    """
    if run.launcher == "none":
        _check_rendezvous(parallel.world_size)
    elif {"TORCHELASTIC_RUN_ID", "RANK"} <= os.environ.keys():
        raise ConfigError(
            f"torchrun has started this process, but launcher={run.launcher!r} would start all "
            f"{parallel.world_size} ranks again in each of its processes. Write --launcher none; or, if the "
            "variable TORCHELASTIC_RUN_ID is left over in this shell, unset it."
        )
    is_here = run.launcher != "ray" or not ray_address()
    if is_here and (name := os.environ.get("GLOO_SOCKET_IFNAME")):
        interfaces = [interface for _, interface in socket.if_nameindex()]
        if not set(name.split(",")) & set(interfaces):
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME is {name!r}, but this machine has no such network interface. Unset it, or write "
                f"one of: {', '.join(interfaces)}."
            )


def _check_interfaces() -> None:
    """Refuse a network interface that no other node can reach."""
    here, everywhere = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if not here or here == everywhere:
        return
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if os.environ.get(name) == "lo":
            others = [f"{interface} ({address})" for interface, address in addresses() if interface != "lo"]
            raise ConfigError(
                f"{name} is 'lo', the loopback interface. Other nodes cannot reach it, and only {here} of {everywhere} "
                "ranks run on this one. Unset it, or write the interface of the network between the nodes: "
                f"{', '.join(others)}."
            )


def addresses() -> list[tuple[str, str]]:
    """Return this machine's IPv4 addresses, each with the name of its network interface in front."""
    import psutil

    found = psutil.net_if_addrs().items()
    return [(name, a.address) for name, entries in found for a in entries if a.family == socket.AF_INET]


def _check_rendezvous(world_size: int) -> None:
    if "RANK" not in os.environ:
        return
    start = "Start the ranks with torchrun, which sets all of them; or, for a run of one process, unset RANK."
    if missing := [name for name in RENDEZVOUS if not os.environ.get(name)]:
        raise ConfigError(f"RANK is set without {', '.join(missing)}. {start}")
    for name in RENDEZVOUS:
        if name != "MASTER_ADDR" and not os.environ[name].isdecimal():
            raise ConfigError(f"{name} is {os.environ[name]!r}, not a whole number. {start}")
    if int(os.environ["WORLD_SIZE"]) != world_size:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but dp x tp asks for {world_size} ranks, so the run would "
            f"hang. Write dp x tp = {os.environ['WORLD_SIZE']}, or start {world_size} ranks."
        )
    if not 0 < int(os.environ["MASTER_PORT"]) < 2**16:
        raise ConfigError(f"MASTER_PORT is {os.environ['MASTER_PORT']}, not a port from 1 to 65535. {start}")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise ConfigError(f"RANK is {os.environ['RANK']}, but WORLD_SIZE is {os.environ['WORLD_SIZE']}. {start}")
    _check_interfaces()
