"""Deliberate faults in the data: a rank reads the wrong examples, or counts the wrong tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tutorial_lib.dataloader import build_train_loader
from tutorial_lib.dataloader.collate import Collate
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer import Trainer


@contextmanager
def same_data_on_each_rank() -> Iterator[type[Trainer]]:
    yield _reading_as(lambda own: Topology(own.dp, own.tp, rank=own.tp_rank))


@contextmanager
def sharded_over_a_larger_grid() -> Iterator[type[Trainer]]:
    """Distribute examples over twice the actual number of ranks."""
    yield _reading_as(lambda own: Topology(2 * own.dp, own.tp, own.rank))


@contextmanager
def sampler_of_the_world() -> Iterator[type[Trainer]]:
    """Distribute examples over all ranks, even if they share their layers."""
    yield _reading_as(lambda own: Topology(own.world_size, 1, own.rank))


def _reading_as(wrong: Callable[[Topology], Topology]) -> type[Trainer]:
    """Return a trainer whose loader reads the examples of a different place in a grid."""

    class Misplaced(Trainer):
        def build_loader(self) -> Any:
            place = wrong(self.topology)
            return build_train_loader(self.config.override(dp=place.dp, tp=place.tp), self.tokenizer, place)

    return Misplaced


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
