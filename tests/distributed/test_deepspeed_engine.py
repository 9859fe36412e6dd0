"""DeepSpeed's engine in one process: closing it frees its memory, and fp16 trains the same with and without ZeRO."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
from torch import Tensor

from tutorial_lib.config import Config
from tutorial_lib.engine import Engine, build_engine
from tutorial_lib.lab.ranks import on_ranks
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer import count_targets, token_loss_sum


def build(config: Config) -> Engine:
    return build_engine(config, Topology.from_environment(config.parallel), num_steps=3)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train_step(engine: Engine) -> tuple[float, float]:
    """Train one step, and return its loss and the norm of its gradient."""
    rows = batch()
    loss = token_loss_sum(engine.forward(rows), rows["labels"]) / count_targets(rows["labels"])
    engine.backward(loss)
    return float(loss), engine.step()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_closing_an_engine_frees_its_model(stage: int) -> None:
    def is_freed() -> bool:
        engine = build(Config.create(engine="deepspeed", zero_stage=stage, dp=1, global_batch=2))
        train_step(engine)
        model = weakref.ref(engine.module)
        engine.close()
        del engine
        gc.collect()
        return model() is None

    assert on_ranks(1, is_freed) == [True]


def test_fp16_takes_the_same_steps_without_zero_as_with_it() -> None:
    """DeepSpeed 0.19.8 does not scale the loss at stage 0, but divides the gradients by the scale."""

    def steps(stage: int) -> list[tuple[float, float]]:
        from deepspeed.accelerator import get_accelerator

        config = Config.create(engine="deepspeed", zero_stage=stage, precision="bf16", dp=1, global_batch=2)
        object.__setattr__(config.engine, "precision", "fp16")  # Config refuses fp16 on a CPU, where it is slow
        with mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: True):
            engine = build(config)
            return [train_step(engine) for _ in range(3)]

    without, with_ = on_ranks(1, lambda: [steps(0), steps(1)])[0]
    for (loss, norm), (expected, expected_norm) in zip(without, with_, strict=True):
        assert loss == pytest.approx(expected, abs=1e-3)
        assert norm == pytest.approx(expected_norm, rel=1e-2)
