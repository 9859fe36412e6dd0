"""Speed of every engine relative to data parallelism without sharding (DDP), on the same batches and two ranks.

One of the engines is a single process that uses both cores. ``measure`` starts the ranks; each runs
``python -m tests.benchmarks.engines``, the local launcher's worker with :func:`compare` in place of the trainer.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.benchmarks.on_ranks import run_on_ranks, time_ratio
from tutorial_lib import trainer
from tutorial_lib.config import Config
from tutorial_lib.dataloader import build_train_loader
from tutorial_lib.engine import build_engine
from tutorial_lib.launch import worker
from tutorial_lib.measure.traffic import count_collectives
from tutorial_lib.models import load_tokenizer
from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory

RANKS = 2
PAIRS = 12
ENGINES: dict[str, dict[str, Any]] = {
    "one process": {"engine": "torch", "dp": 1},
    "FSDP2 full_shard": {"sharding": "full_shard"},
    "FSDP2 shard_grad_op": {"sharding": "shard_grad_op"},
    "ZeRO-1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO-3": {"engine": "deepspeed", "zero_stage": 3},
    "DTensor 1 x 2": {"sharding": "full_shard", "dp": 1, "tp": 2},
    "AutoTP 1 x 2": {"engine": "deepspeed", "zero_stage": 1, "dp": 1, "tp": 2},
}


def measure() -> dict[str, Any]:
    """Return the tokens per second of each engine, relative to DDP."""
    with tempfile.TemporaryDirectory(prefix="tutorial-lib-bench-") as storage:
        config = Config.create(
            "cpu", name="ddp", storage=storage, model="embedded/qwen2", dp=RANKS, engine="fsdp", sharding="no_shard",
            dataset="embedded/articles", batching="packed", seq_length=256, global_batch=16, evaluate=False,
        )  # fmt: skip
        (run,) = run_on_ranks(__name__, [config])
    return {"ranks": RANKS, "global_batch": 16, "seq_length": 256, "model": config.model.name, **run.result}


def compare(config: Config) -> None:
    """Alternate steps of DDP and of each engine, on every rank; rank 0 writes the ratios as the run's result."""
    ratios = {}
    for name, flat in ENGINES.items():
        ratios[name] = _speed(config.override(**({"sharding": "full_shard"} | flat)), config)
        gc.collect()
    if dist.get_rank() == 0:
        RunDirectory(config.directory).result_file.write_text(json.dumps(ratios))
    dist.barrier()


def _speed(config: Config, reference: Config) -> dict[str, Any]:
    """Return a configuration's speed relative to the reference, and the collectives of one of its steps by kind."""
    step, reference_step = _step(config), _step(reference)
    losses = {}

    def one() -> None:
        losses["ours"] = step()

    def other() -> None:
        losses["reference"] = reference_step()

    ratio = time_ratio(other, one, pairs=PAIRS)
    if not math.isclose(losses["ours"], losses["reference"], rel_tol=1e-5):
        raise AssertionError(f"The engines compute different things: {losses}.")
    with count_collectives() as collectives:
        one()
    return {**ratio, "collectives": Counter(each.kind for each in collectives.tensors().collectives)}


def _step(config: Config) -> Callable[[], float]:
    """Return a function that trains one step and returns its loss over all ranks. A single process trains on rank 0."""
    alone = config.parallel.world_size == 1
    topology = Topology.create(config.parallel, rank=0 if alone else dist.get_rank(), world_size=1 if alone else RANKS)
    threads = torch.get_num_threads()
    loader = build_train_loader(config, load_tokenizer(config.model.name), topology)
    engine = build_engine(config, topology, loader.num_steps)
    batches = loader.steps()

    def over_ranks(value: torch.Tensor) -> float:
        if not alone:
            dist.all_reduce(value)
        return float(value) / topology.tp

    def step() -> float:
        _, (batch,) = next(batches)
        tokens = over_ranks(torch.tensor(trainer.count_targets(batch["labels"]), dtype=torch.float64))
        loss = trainer.token_loss_sum(engine.forward(batch), batch["labels"])
        engine.backward(loss / tokens)
        engine.step()
        return over_ranks(loss.detach().double()) / tokens

    def step_alone() -> float:
        loss = torch.zeros(1, dtype=torch.float64)
        if dist.get_rank() == 0:
            torch.set_num_threads(threads * RANKS)
            loss += step()
            torch.set_num_threads(threads)
        dist.broadcast(loss, src=0)
        return float(loss)

    return step_alone if alone else step


def main(*arguments: str) -> None:
    """Run one rank."""
    worker.main(*arguments, train=lambda configs: [compare(config) for config in configs])


if __name__ == "__main__":
    main(*sys.argv[1:])
