"""Speed of our training loop relative to the shortest correct DeepSpeed loop, on the same batches and two ranks.

``measure`` starts the ranks; each runs ``python -m tests.benchmarks.loop``, the local launcher's worker with
:func:`compare` in place of the trainer.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import get_scheduler

from tests.benchmarks.on_ranks import run_on_ranks, time_ratio
from tutorial_lib.config import Config
from tutorial_lib.dataloader import build_train_loader
from tutorial_lib.engine.deepspeed.engine import DeepSpeedEngine
from tutorial_lib.launch import worker
from tutorial_lib.models import load_tokenizer
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.random_states import seed_everything
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer import loop as trainer

STAGES = (1, 3)
FIRST = ("ours", "theirs")
PAIRS = 40


def measure() -> dict[str, Any]:
    """Return the time of our steps relative to the shortest loop's steps, for each stage.

    The engine that is built first has a better place in memory, so each stage runs twice, once in each order. Its
    figure is the geometric mean of both medians.
    """
    with tempfile.TemporaryDirectory(prefix="tutorial-lib-bench-") as storage:
        configs = [
            Config.create(
                "cpu",
                name=f"zero{stage}-{first}",
                storage=storage,
                dp=2,
                zero_stage=stage,
                dataset="embedded/articles",
                seq_length=256,
                global_batch=16,
                steps=10_000,
                evaluate=False,
            )
            for stage in STAGES
            for first in FIRST
        ]
        runs = run_on_ranks(__name__, configs)
    shape = {"ranks": 2, "global_batch": 16, "seq_length": 256, "model": configs[0].model.name}
    by_name = {run.config.run.name: run.result for run in runs}
    return {**shape, **{f"zero{s}": _either_first([by_name[f"zero{s}-{first}"] for first in FIRST]) for s in STAGES}}


def _either_first(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **{key: statistics.geometric_mean(r[key] for r in results) for key in ("median", "median_processor_time")},
        "lowest": min(r["lowest"] for r in results),
        "highest": max(r["highest"] for r in results),
        "pairs": sum(r["pairs"] for r in results),
        "first_built": dict(zip(FIRST, (r["median"] for r in results), strict=True)),
    }


def compare(config: Config) -> None:
    """Alternate steps of both loops, on every rank; rank 0 writes the ratio as the run's result."""
    run = RunDirectory(config.directory)
    topology = Topology.create(config.parallel, rank=dist.get_rank(), world_size=dist.get_world_size())
    ours_first = config.run.name.endswith(FIRST[0])
    shortest = None if ours_first else shortest_loop(config, topology)
    session = trainer.Trainer(config, topology)
    batches = session.loader.steps()
    shortest = shortest or shortest_loop(config, topology)

    # On a busy machine, other programs affect CPU time less than wall time.
    processor: dict[str, list[float]] = {"ours": [], "theirs": []}
    losses = {"ours": 0.0, "theirs": 0.0}

    def timed(name: str, step: Callable[[], float]) -> None:
        began = time.process_time()
        losses[name] = step()
        processor[name].append(time.process_time() - began)

    def our_step() -> float:
        session.train_step(next(batches)[1])
        return float(session.records.last_row()["loss"])

    ratio = time_ratio(
        lambda: timed("ours", our_step),
        lambda: timed("theirs", shortest),
        pairs=PAIRS,
    )
    if not math.isclose(losses["ours"], losses["theirs"], rel_tol=1e-5):
        raise AssertionError(f"The loops compute different things: {losses} after {PAIRS + 1} steps.")
    if topology.rank == 0:
        # The first call of each is a warm-up.
        pairs = zip(processor["ours"][1:], processor["theirs"][1:], strict=True)
        by_processor = statistics.median(one / other for one, other in pairs)
        result = {**ratio, "median_processor_time": by_processor, "last_loss": losses}
        run.result_file.write_text(json.dumps(result))
    session.engine.close()
    dist.barrier()


def shortest_loop(config: Config, topology: Topology) -> Callable[[], float]:
    """Return a function that trains one step with nothing but DeepSpeed, and returns the loss over all ranks.

    It is still correct: every token has the same weight, and the loss covers all ranks.
    """
    seed_everything(config.run.seed)
    ours = DeepSpeedEngine(config, topology, torch.device("cpu"))
    engine = ours.deepspeed
    scheduler = get_scheduler("linear", ours.optimizer, 0, config.run.steps)
    tokenizer = load_tokenizer(config.model.name)
    steps = build_train_loader(config, tokenizer, topology).steps()
    engine.train()

    def one_step() -> float:
        _, micro_batches = next(steps)
        tokens = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in micro_batches]).sum()
        dist.all_reduce(tokens)
        total = torch.zeros(())
        for batch in micro_batches:
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = engine(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / tokens
            engine.backward(loss * topology.dp, scale_wrt_gas=False)
            engine.step()
            total += loss.detach()
        scheduler.step()
        dist.all_reduce(total)
        return float(total)

    return one_step


def main(*arguments: str) -> None:
    """Run one rank."""
    worker.main(*arguments, train=lambda configs: [compare(config) for config in configs])


if __name__ == "__main__":
    main(*sys.argv[1:])
