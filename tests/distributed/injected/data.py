"""Deliberate faults in the data: which examples a rank reads, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist

from tutorial_lib.dataloader.collate import Collate
from tutorial_lib.dataloader.sampler import StepSampler
from tutorial_lib.mpu import Topology


@contextmanager
def same_data_on_each_rank() -> Iterator[None]:
    with mock.patch.object(Topology, "dp_rank", property(lambda self: 0)):
        yield


@contextmanager
def sharded_over_a_larger_grid() -> Iterator[None]:
    """Distribute examples over twice as many ranks as read them, as if the world size were the group's size."""
    with _examples_of(lambda sampler: (sampler._dp_rank, 2 * sampler._dp_size)):
        yield


@contextmanager
def sampler_of_the_world() -> Iterator[None]:
    """Distribute examples over all ranks, even if they share their layers."""
    with _examples_of(lambda sampler: (dist.get_rank(), dist.get_world_size())):
        yield


def _examples_of(reader: Callable[[Any], tuple[int, int]]) -> AbstractContextManager[object]:
    """Give a rank every n-th of a step's examples from the i-th on, where ``reader`` returns (i, n)."""

    def steps(self: Any) -> Iterator[list[int]]:
        while True:
            first, every = reader(self)
            mine = self.examples(self._step)[first::every].tolist()
            self._step += 1
            yield mine

    return mock.patch.object(StepSampler, "__iter__", steps)


@contextmanager
def padding_in_the_loss() -> Iterator[None]:
    collate = Collate.__call__

    def labelled(self: Any, examples: Any) -> Any:
        batches = collate(self, examples)
        for batch in batches:
            batch["labels"] = batch["input_ids"].clone()
        return batches

    with mock.patch.object(Collate, "__call__", labelled):
        yield
