"""The rank grid: which ranks read different data, and which share a layer.

``world size = dp x tp``. Ranks of one tensor-parallel group are adjacent, so that they land on one node, where
links are fast; with ``dp=2, tp=2``::

              tp 0   tp 1
    dp 0   [   0      1  ]   <- one tensor-parallel group: same data, different shards
    dp 1   [   2      3  ]
               ^
               one data-parallel group: same shard, different data

One object owns this arithmetic. Data loading asks it for ``dp_rank``, never for the world rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutorial_lib.config import ConfigError, ParallelConfig

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
    def create(cls, parallel: ParallelConfig, *, rank: int, world_size: int) -> Topology:
        """The place of ``rank`` in the grid that the configuration asks for.

        Raises:
            ConfigError: ``dp x tp`` is not the number of processes that were started.
        """
        if parallel.world_size != world_size:
            raise ConfigError(
                f"dp x tp = {parallel.dp} x {parallel.tp} = {parallel.world_size}, but {world_size} processes were "
                f"started. Write dp={world_size // parallel.tp or 1}, or start {parallel.world_size} processes."
            )
        return cls(dp=parallel.dp, tp=parallel.tp, rank=rank)

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
        """World ranks as rows of tensor-parallel groups; columns are the data-parallel groups."""
        return [[dp_rank * self.tp + tp_rank for tp_rank in range(self.tp)] for dp_rank in range(self.dp)]


def device_mesh(topology: Topology, device_type: str) -> DeviceMesh:
    """The grid as a PyTorch mesh with the axes ``dp`` and ``tp``, and one process group per row and column. Collective.

    The groups are created once per default process group, however many runs a process does.

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
