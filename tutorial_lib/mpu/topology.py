"""Rank grid: the ranks that read different data, and the ranks that share a layer.

``world size = dp x tp``. Ranks of one tensor-parallel group are adjacent, so that they share a node, where
links are fast; with ``dp=2, tp=2``::

              tp 0   tp 1
    dp 0   [   0      1  ]   <- one tensor-parallel group: same data, different shards
    dp 1   [   2      3  ]
               ^
               one data-parallel group: same shard, different data

:class:`Topology` owns this arithmetic. Data loading asks it for ``dp_rank``, never for the world rank.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutorial_lib.config import ConfigError, ParallelConfig
from tutorial_lib.tables import align

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class Topology:
    """One rank's place in the grid.

    Args:
        dp: data-parallel size.
        tp: tensor-parallel size.
        rank: this process's world rank, ``0 <= rank < dp * tp``.
    """

    dp: int
    tp: int
    rank: int

    @classmethod
    def create(
        cls, parallel: ParallelConfig, *, rank: int, world_size: int, local_world_size: int | None = None
    ) -> Topology:
        """Place ``rank`` in the grid that the configuration asks for.

        Args:
            parallel: ``dp`` and ``tp``.
            rank: this process's world rank.
            world_size: number of processes that were started.
            local_world_size: number of processes on this node; None if unknown.

        Raises:
            ConfigError: ``dp x tp`` differs from the number of processes that were started, or a tensor-parallel group
                would span nodes.
        """
        if parallel.world_size != world_size:
            advice = f"Write dp={world_size // parallel.tp}"
            if world_size % parallel.tp:
                advice = f"{world_size} is not a multiple of tp={parallel.tp}. Write dp={world_size} and tp=1"
            raise ConfigError(
                f"dp x tp = {parallel.dp} x {parallel.tp} = {parallel.world_size}, but {world_size} processes were "
                f"started. {advice}, or start {parallel.world_size} processes."
            )
        if local_world_size is not None and local_world_size % parallel.tp:
            fitting = [size for size in range(1, local_world_size + 1) if local_world_size % size == 0]
            raise ConfigError(
                f"tp={parallel.tp} does not divide the {local_world_size} ranks of this node, so a tensor-parallel "
                f"group would span nodes, and every layer would wait for the network. Write tp as one of {fitting}, "
                "or start a multiple of tp ranks on each node."
            )
        return cls(dp=parallel.dp, tp=parallel.tp, rank=rank)

    @classmethod
    def from_environment(cls, parallel: ParallelConfig) -> Topology:
        """Find this process's place among those that torchrun, Ray Train or another launcher has started.

        Rank and world size come from the default process group. Without one, this process is the only rank.

        Args:
            parallel: ``dp`` and ``tp``.

        Raises:
            ConfigError: as for :meth:`create`.
        """
        import torch.distributed as dist

        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        local = os.environ.get("LOCAL_WORLD_SIZE")
        return cls.create(parallel, rank=rank, world_size=world_size, local_world_size=int(local) if local else None)

    @property
    def world_size(self) -> int:
        return self.dp * self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    def grid(self) -> list[list[int]]:
        """Return the world ranks; each row is a tensor-parallel group, each column a data-parallel group."""
        return [[dp_rank * self.tp + tp_rank for tp_rank in range(self.tp)] for dp_rank in range(self.dp)]

    def axes(self) -> dict[str, list[int]]:
        """Return the world ranks of this rank's groups, by the name of their axis: ``tp`` and ``dp``."""
        grid = self.grid()
        return {"tp": grid[self.dp_rank], "dp": [row[self.tp_rank] for row in grid]}

    def drawing(self) -> str:
        """Draw the grid as text: a row per tensor-parallel group, a column per data-parallel group."""
        header = ["", *(f"tp {tp_rank}" for tp_rank in range(self.tp))]
        rows = [[f"dp {dp_rank}", *map(str, ranks)] for dp_rank, ranks in enumerate(self.grid())]
        least = max(len(cell) for row in (header, *rows) for cell in row[1:])
        return "\n".join(align([header, *rows], [False] + [True] * self.tp, least=[6] + [least] * self.tp))


class ModelParallelUnit:
    """The ``mpu`` object that DeepSpeed asks for: this rank's groups, their sizes, and its place in them.

    DeepSpeed's check of the batch sizes takes the data-parallel size from here. Otherwise it would take the world size,
    and the check would fail.

    Args:
        topology: this rank's place in the grid.
        mesh: the grid's process groups, see :func:`device_mesh`.
    """

    def __init__(self, topology: Topology, mesh: DeviceMesh) -> None:
        self.topology = topology
        self.mesh = mesh

    def get_data_parallel_group(self) -> Any:
        return self.mesh.get_group("dp")

    def get_data_parallel_rank(self) -> int:
        return self.topology.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.topology.dp

    def get_model_parallel_group(self) -> Any:
        return self.mesh.get_group("tp")

    def get_model_parallel_rank(self) -> int:
        return self.topology.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.topology.tp


def device_mesh(topology: Topology, device_type: str) -> DeviceMesh:
    """Build the grid as a PyTorch mesh with axes ``dp`` and ``tp``: a process group per row and column.

    All ranks must call this function. The groups are created once per default process group, however many runs the
    process trains.

    Args:
        topology: this rank's place in the grid.
        device_type: ``cpu`` (gloo) or ``cuda`` (NCCL).
    """
    import torch.distributed as dist

    return _device_mesh(dist.group.WORLD, topology.dp, topology.tp, device_type)


@functools.cache
def _device_mesh(world: object, dp: int, tp: int, device_type: str) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (dp, tp), mesh_dim_names=("dp", "tp"))
