"""Checkpoints of each engine: their size, the speed of saving and restoring, and the time that a step waits.

There are two baselines, in which the same ranks write the same tensors with plain ``torch.save`` (which adds a CRC-32).
The first one adds ``fsync`` and a rename, so that the checkpoint survives a power failure. The second one ends with a
copy in memory. A save that training waits for ends on the disk, so it is compared with the first. With ``async_save``,
training waits only for a copy in memory, so it is compared with the second. Loads are compared with ``torch.load``,
which does not copy anything into an engine; a first, uncounted load brings the files into memory.

``measure`` starts the ranks; each runs ``python -m tests.benchmarks.checkpoints``, the local launcher's worker with
:func:`compare` in place of the trainer.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from tests.benchmarks.on_ranks import run_on_ranks
from tutorial_lib import checkpoint
from tutorial_lib.checkpoint import rank_writer
from tutorial_lib.checkpoint.directory import finish_deletions
from tutorial_lib.checkpoint.manifest import sync
from tutorial_lib.config import Config
from tutorial_lib.embedded import model_directory
from tutorial_lib.launch import worker
from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory
from tutorial_lib.theory.memory import DEEPSPEED_FP32, FP32, checkpoint_bytes, tensor_parallel_params
from tutorial_lib.trainer import loop as trainer

RANKS = 2
PAIRS = int(os.environ.get("TUTORIAL_LIB_BENCH_PAIRS", "5"))
SHAPE = {"n_embd": 1152, "n_layer": 2}
"""A GPT-2 with 35 million parameters (420 to 560 MB on disk), wide and shallow because engines also spend time per
tensor. Its layers' matrices have 1.3 to 5.3 million elements; five of seven in Qwen2.5-0.5B have 0.8 or 4.4 million."""

ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-3": {"zero_stage": 3},
    "FSDP2 full_shard": {"engine": "fsdp"},
    "AutoTP 1 x 2": {"zero_stage": 1, "dp": 1, "tp": 2},
}


def measure() -> dict[str, Any]:
    """Return each engine's bytes relative to the formula, MB/s relative to plain saves, and seconds of waiting."""
    with tempfile.TemporaryDirectory(prefix="tutorial-lib-bench-") as storage:
        model = Path(storage) / "model"
        # AutoTP does not split GPT-2, so the tensor-parallel run uses Qwen2.
        for kind, name in (("gpt2", "embedded/gpt2"), ("qwen2", "embedded/qwen2")):
            _larger(model_directory(name), model / kind)
        configs = [
            Config.create(
                "cpu", name=name.replace(" ", "_"), storage=storage, model=str(model / kind), random_init=True,
                **{"dp": RANKS, "seq_length": 32, "global_batch": RANKS, "steps": 10_000, "evaluate": False,
                   "async_save": True, **flat},
            )
            for name, flat in ENGINES.items()
            for kind in ["qwen2" if "tp" in flat else "gpt2"]
        ]  # fmt: skip
        runs = run_on_ranks(__name__, configs)
        return {"ranks": RANKS, "pairs": PAIRS, **dict(zip(ENGINES, (run.result for run in runs), strict=True))}


def _larger(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    path = target / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] == "gpt2":
        config |= SHAPE
    else:
        config |= {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 2}
        config.pop("layer_types", None)
    path.write_text(json.dumps(config))


def compare(config: Config) -> None:
    """Compare one engine's saves and loads with plain ones, on every rank; rank 0 writes the run's result."""
    run = RunDirectory(config.directory)
    if dist.get_rank() == 0:
        run.create()
    dist.barrier()
    topology = Topology.create(config.parallel, rank=dist.get_rank(), world_size=dist.get_world_size())
    session = trainer.Trainer(config, topology)
    batches = session.loader.steps()
    session.train_step(next(batches)[1])
    plain = _Plain(config.directory / "plain")
    saving = _alternated(
        plain,
        ours=functools.partial(session.save, more_steps=False),
        handed_over=functools.partial(_hand_over, session),
        plain=functools.partial(plain.save, session.engine),
        on_disk=functools.partial(plain.save, session.engine, on_disk=True),
    )
    path = checkpoint.directory_of(run, session.step)

    def restore() -> None:
        checkpoint.verify(path, topology)
        checkpoint.load(path, session.engine, config, topology)

    loading = _alternated(plain, ours=restore, plain=plain.load)
    written, plain_bytes = session.checkpoints.saves[-1]["bytes"], _sum_of_ranks(plain.bytes)
    result = {
        "num_parameters": session.engine.num_parameters,
        "bytes": written,
        "over_formula": written / _formula(config, session.engine),
        "save": _figures(saving, "ours", "plain", written, plain_bytes),
        "save_on_disk": _figures(saving, "ours", "on_disk", written, plain_bytes),
        "save_handed_over": _figures(saving, "handed_over", "plain", written, plain_bytes),
        "load": _figures(loading, "ours", "plain", written, plain_bytes),
        "stall": _stalls(session, batches),
    }
    session.close()
    if topology.rank == 0:
        run.result_file.write_text(json.dumps(result))
        finish_deletions()
        shutil.rmtree(run.checkpoints)
        shutil.rmtree(plain.directory)
    gc.collect()
    dist.barrier()


def _formula(config: Config, engine: Any) -> int:
    if config.engine.name == "fsdp":
        return checkpoint_bytes(engine.num_parameters, 0, FP32)
    layout, tp = engine.layout(), config.parallel.tp
    replicated = sum(torch.Size(row.before).numel() for row in layout if row.dim is None)
    num_params = tp * tensor_parallel_params(engine.num_parameters, replicated, tp) if tp > 1 else engine.num_parameters
    return checkpoint_bytes(num_params, config.engine.zero_stage, DEEPSPEED_FP32)


class _Plain:
    """Plain saves: each rank writes its own files with ``torch.save``."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.bytes = directory, 0
        directory.mkdir(exist_ok=True)

    def save(self, engine: Any, on_disk: bool = False) -> None:
        """Write new files. With ``on_disk``, sync them to the disk and put them in place of the old ones."""
        # Some engines copy their states before they save them. A plain save includes that copy.
        collected = _Collected(self.directory / "unused")
        engine.save(self.directory / "unused", collected)
        files = [self._file(number).with_suffix(".new") for number in range(len(collected.states))]
        for states, file in zip(collected.states, files, strict=True):
            torch.save(states, file)
        self.bytes = sum(file.stat().st_size for file in files)
        if on_disk:
            for file in files:
                sync(file)
            self.settle()
            sync(self.directory)

    def settle(self) -> None:
        """Replace the old files with the new ones, which some file systems then write to the disk."""
        for new in self.directory.glob(f"{dist.get_rank()}-*.new"):
            os.replace(new, new.with_suffix(".pt"))

    def load(self) -> None:
        number = 0
        while self._file(number).exists():
            torch.load(self._file(number), map_location="cpu", weights_only=False)
            number += 1

    def _file(self, number: int) -> Path:
        return self.directory / f"{dist.get_rank()}-{number}.pt"


class _Collected(rank_writer.Writer):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.states: list[Any] = []

    def submit(self, job: Callable[..., Any], *given: Any) -> None:
        self.states.append(tree_map(lambda t: t.to_local() if isinstance(t, DTensor) else t, given[0]))


def _hand_over(session: Any) -> float:
    """Save as between two training steps, and return how long training would wait on the slowest rank.

    The second half of the save, which makes the checkpoint visible, begins once all files are written, and counts too.
    """
    session.save(more_steps=True)
    while not session.checkpoints.is_written():
        time.sleep(0.005)
    dist.barrier()
    session.checkpoints.finish()
    return float(session.checkpoints.saves[-1]["stall_seconds"])


def _alternated(files: _Plain, **procedures: Callable[[], float | None]) -> list[dict[str, float]]:
    """Return the seconds of each procedure in each round, without the first round.

    If a procedure returns a number, that is its time. Otherwise, its time ends when the slowest rank is done.
    Each call begins once the disk is idle, so that it does not pay for earlier writes or for freeing old files.
    """
    rounds = []
    for number in range(PAIRS + 1):
        seconds = {}
        for name, procedure in list(procedures.items())[:: 1 if number % 2 else -1]:
            files.settle()
            finish_deletions()
            os.sync()
            dist.barrier()
            began = time.perf_counter()
            waited = procedure()
            dist.barrier()
            seconds[name] = time.perf_counter() - began if waited is None else waited
        rounds.append(seconds)
    return rounds[1:]


def _figures(rounds: list[dict[str, float]], of: str, against: str, ours: int, theirs: int) -> dict[str, float]:
    pairs = [(seconds[of], seconds[against]) for seconds in rounds]
    ratios = [(ours / one) / (theirs / other) for one, other in pairs]
    return {
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "megabytes_per_second": statistics.median(ours / one for one, _ in pairs) / 1e6,
        "plain_megabytes_per_second": statistics.median(theirs / other for _, other in pairs) / 1e6,
        "seconds": statistics.median(one for one, _ in pairs),
    }


def _sum_of_ranks(number: int) -> int:
    numbers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return sum(numbers)


def _stalls(session: Any, batches: Iterator[Any]) -> dict[str, Any]:
    """Return the seconds for which a save stalls training, and those lost until it is written, for each way to save."""
    for _ in range(3):
        session.train_step(next(batches)[1])
    step = statistics.median(_one_step(session, batches) for _ in range(5))
    waits: dict[str, list[float]] = {"at once": [], "async_save": []}
    losses: dict[str, list[float]] = {"at once": [], "async_save": []}
    steps_meanwhile = []
    for attempt in range(8):
        name = ("at once", "async_save")[attempt % 2]
        session.train_step(next(batches)[1])
        before = time.perf_counter()
        session.save(more_steps=name == "async_save")
        saving, count = session.steps_done, 0
        while session.checkpoints.saved_at != saving:
            count += 1
            session.train_step(next(batches)[1])
            session.checkpoints.finish_if_written()
        lost = time.perf_counter() - before - count * step
        if attempt >= 2:  # the first save of each kind allocates memory
            waits[name].append(session.checkpoints.saves[-1]["stall_seconds"])
            losses[name].append(lost)
            if count:
                steps_meanwhile.append(count)
    return {
        "seconds_of_a_step": step,
        "steps_meanwhile": statistics.median(steps_meanwhile),
        **{
            name: {
                "stall_seconds": statistics.median(waits[name]),
                "seconds_lost": statistics.median(losses[name]),
            }
            for name in waits
        },
    }


def _one_step(session: Any, batches: Iterator[Any]) -> float:
    began = time.perf_counter()
    session.train_step(next(batches)[1])
    return time.perf_counter() - began


def main(*arguments: str) -> None:
    """Run one rank."""
    worker.main(*arguments, train=lambda configs: [compare(config) for config in configs])


if __name__ == "__main__":
    main(*sys.argv[1:])
