"""Collectives for all packages: all-gather of objects and integers, broadcast of an object, and the barrier.

All ranks must call these functions, in the same order. Without a process group there is a single rank, and nothing is
sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def all_gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_ints(numbers: Sequence[int]) -> list[list[int]]:
    """Return the integers of all ranks, in rank order. Every rank must pass the same number of them.

    They are sent as an integer tensor, so that :mod:`tutorial_lib.measure.traffic` counts them as bookkeeping.
    """
    if not dist.is_initialized():
        return [list(numbers)]
    # With NCCL alone, which is Ray's default, tensors in host memory cannot be sent.
    device = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    by_rank = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(by_rank, own)
    return [numbers.tolist() for numbers in by_rank]


def barrier() -> None:
    """Wait until every rank has arrived."""
    if dist.is_initialized():
        dist.barrier()
