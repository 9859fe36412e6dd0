"""Collectives that every room uses: objects, integers and tensors from all ranks, and the barrier.

Every function here is collective: all ranks must call it, in the same order. Without a process group there is one rank,
and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def all_gather_objects(value: T) -> list[T]:
    """Return every rank's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_ints(numbers: Sequence[int]) -> list[list[int]]:
    """Return every rank's integers, by rank. All ranks give equally many.

    Integers, so that :mod:`tutorial_lib.measure.traffic` counts them as bookkeeping on any number of ranks.
    """
    if not dist.is_initialized():
        return [list(numbers)]
    # NCCL alone, as Ray sets it up by itself, exchanges nothing that is in host memory.
    device = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    by_rank = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(by_rank, own)
    return [numbers.tolist() for numbers in by_rank]


def all_gather_tensor(share: Tensor, dim: int | None, group: Any) -> Tensor:
    """Return the full tensor of which each rank of ``group`` holds an equal share along ``dim``.

    Args:
        share: this rank's share.
        dim: the tensor dimension that was split; with None the tensor is replicated, and returned as it is.
        group: the process group that shares it.
    """
    if dim is None:
        return share
    shares = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, share.contiguous(), group=group)
    return torch.cat(shares, dim)


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()
