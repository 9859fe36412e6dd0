"""ZeRO partitions: where a rank keeps its piece of each parameter's fp32 copy and moments.

The optimizer sees long vectors, one or a few per rank, instead of the model's parameters. At stages 1 and 2 all
parameters are concatenated and cut equally among ranks, so a cut may fall inside a parameter::

    [   wte   |  wpe | ln | c_attn  | ...   ]
    [  rank 0's vector  ][  rank 1's vector ]

At stage 3 each parameter is cut among ranks, the last piece padded, and a rank's pieces are concatenated::

    rank 0: [ wte 1/2 | wpe 1/2 | ln 1/2 | ... ]     rank 1: [ wte 2/2 | wpe 2/2 | ln 2/2 | ... ]

This module reads DeepSpeed's objects without importing DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's piece of a parameter, and its place in the vector that the optimizer updates.

    Attributes:
        vector: the vector that the optimizer updates, and that its states belong to.
        first: first index of the piece in the vector.
        start: first index of the piece in the flattened parameter.
        stop: index after the piece's last one; at most ``start`` if this rank has no part of the parameter.
    """

    vector: Tensor
    first: int
    start: int
    stop: int

    def fill(self, target: Tensor, values: Tensor) -> None:
        """Copy this piece of a parameter's values into the vector, or into one with the same layout."""
        if self.start < self.stop:
            held = target.view(-1)[self.first : self.first + self.stop - self.start]
            held.copy_(values.reshape(-1)[self.start : self.stop])


def pieces(optimizer: Any, stage: int) -> Iterator[tuple[Tensor, Piece]]:
    """Yield every trained parameter with this rank's piece of it.

    Args:
        optimizer: DeepSpeed's optimizer of stage 1, 2 or 3.
        stage: the ZeRO stage.
    """
    if stage == 3:
        for parameter in (parameter for group in optimizer.fp16_groups for parameter in group):
            group, first, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, stop = _bounds(parameter)
            yield parameter, Piece(optimizer.fp32_partitioned_groups_flat[group], first, start, stop)
        return
    for group, vector in enumerate(optimizer.single_partition_of_fp32_groups):
        begin = dist.get_rank(optimizer.real_dp_process_group[group]) * vector.numel()
        # Follow the layout's order, which differs from the model's if round_robin_gradients is set.
        offsets = optimizer.round_robin_bit16_offsets[group]
        for parameter, offset in zip(optimizer.round_robin_bit16_groups[group], offsets, strict=True):
            start, stop = max(begin - offset, 0), min(begin + vector.numel() - offset, parameter.numel())
            yield parameter, Piece(vector, max(offset - begin, 0), start, stop)


def fill_shard(parameter: Any, values: Tensor) -> None:
    """At stage 3, copy this rank's piece of a parameter's values into the shard that the model gathers it from."""
    start, stop = _bounds(parameter)
    Piece(parameter.ds_tensor, 0, start, stop).fill(parameter.ds_tensor, values)


def _bounds(parameter: Any) -> tuple[int, int]:
    # A share from AutoTP is cut among the data-parallel ranks; any other parameter is cut among all ranks.
    size = parameter.ds_tensor.numel()
    start = parameter.ds_zero_partition_rank * size
    return start, min(start + size, parameter.ds_numel)
