"""Deliberate faults in the update: the loss's divisor, the mean of gradients, clipping, and DeepSpeed's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from tests.distributed.observing.watching import own_tokens
from tutorial_lib.checkpoint.manager import OnCheckpoint
from tutorial_lib.config import Config
from tutorial_lib.engine.deepspeed import config as ds_config
from tutorial_lib.trainer import Trainer, count_tokens
from tutorial_lib.trainer.metrics import StepRow


@contextmanager
def clipping_dropped() -> Iterator[None]:
    with changed_deepspeed_config(lambda built: built.update(gradient_clipping=0.0)):
        yield


@contextmanager
def clipping_left_to_the_default() -> Iterator[None]:
    with changed_deepspeed_config(lambda built: built.pop("gradient_clipping")):
        yield


def changed_deepspeed_config(change: Callable[[dict[str, Any]], object]) -> AbstractContextManager[object]:
    """Return a patch that changes each configuration that is built for DeepSpeed."""
    build = ds_config.build

    def changed(config: Config) -> dict[str, Any]:
        built = build(config)
        change(built)
        return built

    return mock.patch.object(ds_config, "build", changed)


class _OwnMean(Trainer):
    """Trainer whose backward pass gets the mean over this rank's own tokens, divided by :meth:`ranks`."""

    def ranks(self) -> int:
        return 1

    def build_engine(self) -> Any:
        engine = super().build_engine()
        backward = engine.backward

        def scaled(loss: Tensor) -> None:
            self.own_loss += float(loss) * self.scale
            backward(loss * self.scale)

        engine.backward = scaled
        return engine

    def train_step(self, micro_batches: list[dict[str, Tensor]]) -> None:
        self.own_loss, self.own_tokens = 0.0, own_tokens(micro_batches)
        self.scale = count_tokens(micro_batches, self.topology) / (self.own_tokens * self.ranks())
        super().train_step(micro_batches)


@contextmanager
def mean_of_means() -> Iterator[type[Trainer]]:
    """Average the means of the ranks, although the ranks hold different numbers of tokens."""

    class MeanOfMeans(_OwnMean):
        def ranks(self) -> int:
            return self.topology.dp

    yield MeanOfMeans


@contextmanager
def loss_of_own_tokens() -> Iterator[type[Trainer]]:
    """Train on the mean over each rank's own tokens, and report the mean of rank 0."""

    class OwnLoss(_OwnMean):
        def build(self, on_checkpoint: OnCheckpoint | None) -> None:
            super().build(on_checkpoint)
            add = self.records.add

            def add_own(row: StepRow) -> None:
                add(dataclasses.replace(row, loss=self.own_loss, tokens=self.own_tokens))

            self.records.add = add_own

    yield OwnLoss


# On r ranks, a loss that is r times too large has the effect of a collective that sums instead of averaging. A loss
# that is r times too small has the effect of averaging twice.


@contextmanager
def gradients_summed() -> Iterator[type[Trainer]]:
    yield _averaging_over(lambda ranks: ranks * ranks)


@contextmanager
def gradients_averaged_twice() -> Iterator[type[Trainer]]:
    yield _averaging_over(lambda ranks: 1)


def _averaging_over(ranks: Callable[[int], int]) -> type[Trainer]:
    """Return a trainer whose engine believes that it averages gradients over a different number of ranks."""

    class Averaging(Trainer):
        def build_engine(self) -> Any:
            engine = super().build_engine()
            engine.averages_over = ranks(engine.averages_over)
            return engine

    return Averaging


@contextmanager
def trial_step_kept() -> Iterator[None]:
    """Keep the step that DeepSpeed's 16-bit optimizer takes when it is constructed."""
    from tutorial_lib.engine.deepspeed.engine import DeepSpeedEngine

    with mock.patch.object(DeepSpeedEngine, "undo_step_of_construction", lambda self: None):
        yield
