"""Deliberate faults in the update: the loss's divisor, the mean of gradients, clipping, and DeepSpeed's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from tests.distributed.watching import own_tokens
from tutorial_lib.config import Config
from tutorial_lib.engine.deepspeed import config as ds_config
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer import loop as trainer


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


@contextmanager
def mean_of_means() -> Iterator[None]:
    """Average the ranks' means, although they hold different numbers of tokens."""
    with _loss_times(lambda own, total, ranks: total / (own * ranks)):
        yield


def _loss_times(factor: Callable[[int, int, int], float]) -> AbstractContextManager[object]:
    """Scale the loss that goes into backward by a function of (this rank's tokens, all tokens, ranks)."""
    count, build = trainer.count_tokens, trainer.build_engine
    scale = [1.0]

    def counted(micro_batches: Any, topology: Topology, **given: Any) -> int:
        total = count(micro_batches, topology, **given)
        scale[0] = factor(own_tokens(micro_batches), total, topology.dp)
        return total

    def built(*args: Any) -> Any:
        engine = build(*args)
        backward = engine.backward
        engine.backward = lambda loss: backward(loss * scale[0])
        return engine

    return mock.patch.multiple(trainer, count_tokens=counted, build_engine=built)


@contextmanager
def loss_of_own_tokens() -> Iterator[None]:
    """Report the mean over each rank's own tokens."""

    def own(micro_batches: Any, topology: Topology, **given: Any) -> int:
        return own_tokens(micro_batches)

    def not_reduced(value: Tensor, topology: Topology, **given: Any) -> float:
        return float(value)

    with mock.patch.multiple(trainer, count_tokens=own, sum_over_ranks=not_reduced):
        yield


# A loss that is r times too large gives what a collective that sums instead of averaging gives, and the reverse.


@contextmanager
def gradients_summed() -> Iterator[None]:
    with _averages_over(lambda ranks: ranks * ranks):
        yield


@contextmanager
def gradients_averaged_twice() -> Iterator[None]:
    with _averages_over(lambda ranks: 1):
        yield


def _averages_over(ranks: Callable[[int], int]) -> AbstractContextManager[object]:
    """Make the engine believe that it averages gradients over a different number of ranks."""
    build = trainer.build_engine

    def built(*args: Any) -> Any:
        engine = build(*args)
        engine.averages_over = ranks(engine.averages_over)
        return engine

    return mock.patch.object(trainer, "build_engine", built)


@contextmanager
def trial_step_kept() -> Iterator[None]:
    """Keep the step that DeepSpeed's 16-bit optimizer takes before the first one."""
    from tutorial_lib.engine.deepspeed.engine import DeepSpeedEngine

    with mock.patch.object(DeepSpeedEngine, "_undo_trial_step", lambda self: None):
        yield
