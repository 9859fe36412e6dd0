"""Deliberate faults within a tensor-parallel group: all-reduces, splits, seeds and norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist

from tests.distributed.injected.update import changed_deepspeed_config
from tutorial_lib import engine as engines
from tutorial_lib.trainer import rank_agreement


@contextmanager
def seed_of_each_rank() -> Iterator[None]:
    """Draw different dropout masks on ranks that share their layers."""
    seed = engines.seed_everything
    with mock.patch.object(engines, "seed_everything", lambda number: seed(number + 1000 * dist.get_rank())):
        yield


@contextmanager
def row_all_reduce_skipped() -> Iterator[None]:
    with _all_reduce_skipped("RowParallel", "forward"):
        yield


@contextmanager
def column_all_reduce_skipped() -> Iterator[None]:
    """Skip the all-reduce in backward, and switch off the comparison of losses within the group."""
    with (
        _all_reduce_skipped("ColumnParallel", "backward"),
        mock.patch.object(rank_agreement, "SAME_LOSS", float("inf")),
    ):
        yield


def _all_reduce_skipped(function: str, direction: str) -> AbstractContextManager[object]:
    """Make one of AutoTP's two autograd functions pass on only this rank's part."""
    from deepspeed.module_inject import layers

    def passed_on(ctx: Any, *given: Any) -> Any:
        return given[1] if direction == "forward" else (None, *given, *[None] * (function == "RowParallel"))

    return mock.patch.object(getattr(layers, function), direction, staticmethod(passed_on))


@contextmanager
def projections_not_split() -> Iterator[None]:
    """Use a plan without the MLP's projections, so that shapes still fit."""
    from tutorial_lib.engine.deepspeed import engine

    attention = [
        {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
    ]
    plan = {"use_default_specs": False, "layer_specs": attention}
    changed = changed_deepspeed_config(lambda built: built["tensor_parallel"].update(partition_config=plan))
    with changed, mock.patch.object(engine.ds_config, "add_plan", lambda settings, model_config: None):
        yield


@contextmanager
def columns_not_moved() -> Iterator[None]:
    """Cut GPT-2's fused columns without reordering: the first rank gets all queries and half of the keys."""
    from tutorial_lib.engine.fsdp import weights

    with mock.patch.object(weights, "by_rank", lambda tensor, tp: tensor):
        yield


@contextmanager
def replicated_gradients_counted_twice() -> Iterator[None]:
    """Count replicated gradients in the norm once per tensor-parallel rank."""
    from tutorial_lib.engine.fsdp import sharding

    with mock.patch.object(sharding, "num_copies", lambda gradient, world_size: 1):
        yield


@contextmanager
def slopes_of_the_first_heads() -> Iterator[None]:
    """Give every rank the ALiBi slopes of a model that has only as many heads as the rank."""
    from tutorial_lib.engine.fsdp import tensor_parallel

    def first_slopes(model: Any, tp: int, tp_rank: int) -> None:
        heads = model.config.n_head // tp
        inner, build = model.base_model, model.base_model.build_alibi_tensor
        inner.build_alibi_tensor = lambda mask, num_heads, dtype: build(mask, num_heads=heads, dtype=dtype)

    with mock.patch.object(tensor_parallel, "slice_alibi", first_slopes):
        yield
