"""Useful tokens per second of each way to batch short texts, with everything else the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tutorial_lib.config import Config
from tutorial_lib.dataloader import build_train_loader
from tutorial_lib.engine import build_engine
from tutorial_lib.models import load_tokenizer
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer import count_targets, token_loss_sum

SEQ_LENGTH, BATCH, PAIRS = 512, 8, 7
STEPS = {"longest": 12, "packed": 2, "max_length": 2}
"""Steps of one measurement, so that all take about the same time."""


def measure() -> dict[str, Any]:
    """Compare ``longest`` and ``packed`` with ``max_length`` in alternating training steps."""
    torch.set_num_threads(1)
    padded, *others = (_trainer(batching) for batching in ("max_length", "longest", "packed"))
    result: dict[str, Any] = {"seq_length": SEQ_LENGTH, "batch": BATCH, "pairs": PAIRS, "tokens_per_second": {}}
    for name, ours in zip(("longest", "packed"), others, strict=True):
        ours(), padded()
        pairs = []
        for pair in range(PAIRS):
            if pair % 2:
                slow, fast = padded(), ours()
            else:
                fast, slow = ours(), padded()
            pairs.append((fast, slow))
        ratios = [fast / slow for fast, slow in pairs]
        result[name] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        result["tokens_per_second"][name] = statistics.median(fast for fast, _ in pairs)
        result["tokens_per_second"]["max_length"] = statistics.median(slow for _, slow in pairs)
    return result


def _trainer(batching: str) -> Callable[[], float]:
    """Return a function that trains some steps, and returns how many tokens per second counted in the loss."""
    config = Config.create(
        "cpu",
        engine="torch",
        dp=1,
        dataset="embedded/news",
        model="embedded/gpt2",
        seq_length=SEQ_LENGTH,
        global_batch=BATCH,
        batching=batching,
        steps=10_000,
    )
    topology = Topology.create(config.parallel, rank=0, world_size=1)
    loader = build_train_loader(config, load_tokenizer(config.model.name), topology)
    engine, steps = build_engine(config, topology, loader.num_steps), loader.steps()

    def some_steps() -> float:
        began, counted = time.perf_counter(), 0
        for _ in range(STEPS[batching]):
            for batch in next(steps)[1]:
                tokens = count_targets(batch["labels"])
                engine.backward(token_loss_sum(engine.forward(batch), batch["labels"]) / tokens)
                counted += tokens
            engine.step()
        return counted / (time.perf_counter() - began)

    return some_steps
