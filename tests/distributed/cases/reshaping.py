"""Reshaped runs, which are saved in one shape and continued in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.cases.equivalence import ACCUMULATED, BF16, CASES, OFFLOADED, STAGES
from tests.distributed.cases.interruption import END, STOP
from tests.distributed.cases.small_runs import config, copy_run
from tests.distributed.observing.probe import Probe, ProbedRun
from tutorial_lib.config import Config

RESHAPE_CASES = ("gpt2", "qwen2", "frozen", "odd", "scaled")
"""Cases without dropout, because a different number of ranks draws different random numbers."""

SAVED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "torch": (1, "gpt2", {"engine": "torch"}),
    "zero0": (2, "gpt2", STAGES["zero0"]),
    "zero1": (2, "gpt2", STAGES["zero1"]),
    "zero2-optimizer": (2, "gpt2", OFFLOADED["zero2-optimizer"]),
    "zero3": (2, "gpt2", STAGES["zero3"]),
    "fsdp": (2, "gpt2", {"engine": "fsdp"}),
    "fsdp-tp2": (2, "gpt2", {"engine": "fsdp", "tp": 2}),
    "fsdp-qwen2": (2, "qwen2", {"engine": "fsdp"}),
    "fsdp-scaled": (2, "scaled", {"engine": "fsdp"}),
    "1x2-zero1": (2, "qwen2", {"zero_stage": 1, "tp": 2}),
    "frozen-zero1": (2, "frozen", STAGES["zero1"]),
    "odd-zero3": (2, "odd", STAGES["zero3"]),
    "zero1-bf16": (2, "gpt2", BF16["zero1-bf16"]),
    "zero3-bf16": (2, "gpt2", BF16["zero3-bf16"]),
    "1x2-zero1-bf16": (2, "qwen2", {"zero_stage": 1, "tp": 2, "precision": "bf16"}),
    "dropout": (2, "gpt2", {"zero_stage": 1, "model": "gpt2-dropout"}),
    "2x2-zero3": (4, "qwen2", {"zero_stage": 3, "tp": 2}),
    "4x1-zero2": (4, "odd", STAGES["zero2"]),
}
"""Runs that stop at ``STOP``, in the middle of an epoch, with the number of ranks, the case and the shape of each."""

RESHAPED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "4x1-of-2x2": (4, "2x2-zero3", {"zero_stage": 1, "stop_after": STOP + 1}),
    "hybrid-of-zero1": (4, "zero1", {"engine": "fsdp", "sharding": "hybrid_shard", "shard_size": 2}),
    "fsdp-of-torch": (2, "torch", {"engine": "fsdp"}),
    "zero2-optimizer-of-torch": (2, "torch", OFFLOADED["zero2-optimizer"]),
    "zero0-of-torch": (2, "torch", STAGES["zero0"]),
    "zero2-of-zero0": (2, "zero0", STAGES["zero2"]),
    "zero3-accumulated-of-zero1": (2, "zero1", ACCUMULATED["zero3-accumulated"]),
    "zero1-of-zero3": (2, "zero3", STAGES["zero1"]),
    "zero3-all-of-zero3": (2, "zero3", OFFLOADED["zero3-all"]),
    "zero2-of-zero2-optimizer": (2, "zero2-optimizer", STAGES["zero2"]),
    "persistent-of-zero2-optimizer": (2, "zero2-optimizer", {"zero_stage": 3, "persistence_threshold": 1000}),
    "fsdp-of-zero3": (2, "zero3", {"engine": "fsdp"}),
    "zero1-of-fsdp": (2, "fsdp", STAGES["zero1"]),
    "fsdp-tp2-of-fsdp": (2, "fsdp", {"engine": "fsdp", "tp": 2}),
    "fsdp-none-of-fsdp-tp2": (2, "fsdp-tp2", {"engine": "fsdp", "sharding": "no_shard"}),
    "fsdp-tp2-of-fsdp-qwen2": (2, "fsdp-qwen2", {"engine": "fsdp", "tp": 2}),
    "1x2-zero3-of-fsdp-qwen2": (2, "fsdp-qwen2", {"zero_stage": 3, "tp": 2}),
    "fsdp-none-of-fsdp-scaled": (2, "fsdp-scaled", {"engine": "fsdp", "sharding": "no_shard"}),
    "zero3-of-fsdp-scaled": (2, "fsdp-scaled", STAGES["zero3"]),
    "fsdp-of-1x2-zero1": (2, "1x2-zero1", {"engine": "fsdp"}),
    "fsdp-of-frozen-zero1": (2, "frozen-zero1", {"engine": "fsdp"}),
    "zero1-of-odd-zero3": (2, "odd-zero3", STAGES["zero1"]),
    "2x1-of-4x1": (2, "4x1-zero2", STAGES["zero3"]),
    "1-of-4x1-of-2x2": (1, "4x1-of-2x2", {"engine": "torch"}),
    "zero3-of-zero1": (1, "zero1", STAGES["zero3"]),
    "zero3-all-of-fsdp-tp2": (1, "fsdp-tp2", OFFLOADED["zero3-all"]),
    "zero3-of-frozen-zero1": (1, "frozen-zero1", STAGES["zero3"]),
    "zero0-of-odd-zero3": (1, "odd-zero3", STAGES["zero0"]),
}
"""Runs that continue a saved one, with the number of ranks, the name of the saved run, and the new shape of each."""

RESHAPED_WITHOUT_TRAINING: dict[str, tuple[int, str, dict[str, Any]]] = {
    "zero3-of-zero1-bf16": (2, "zero1-bf16", BF16["zero3-bf16"]),
    "zero0-of-zero3-bf16": (2, "zero3-bf16", BF16["zero0-bf16"]),
    "zero2-optimizer-of-zero3-bf16": (2, "zero3-bf16", OFFLOADED["zero2-optimizer"]),
    "fsdp-of-1x2-zero1-bf16": (2, "1x2-zero1-bf16", {"engine": "fsdp"}),
}
"""Runs that continue a saved one but stop at once, so they only save the loaded states in a different shape."""

RESHAPED_TWICE = ("dropout-once", "dropout-twice")

RESHAPE_FAULTS = {
    "restore.updates_not_counted": "zero1-of-zero3",
    "restore.columns_left_by_rank": "fsdp-none-of-fsdp-tp2",
    "restore.moments_exchanged": "fsdp-of-zero3",
}
"""Deliberate faults in a reshape, and the reshaped run of each. The run with a fault has the fault's name."""


def uninterrupted_torch(directory: Path, case: str) -> Config:
    """Return the uninterrupted run, in one process with plain torch, that reshaped runs must equal."""
    return _reshapable(directory, case, 1, {"engine": "torch"}, f"uninterrupted-torch.{case}")


def saved(directory: Path, name: str) -> Config:
    ranks, case, flat = SAVED[name]
    return _reshapable(directory, case, ranks, {**flat, "stop_after": STOP}, f"saved.{name}")


def reshaped(directory: Path, name: str) -> Config:
    ranks, source, flat = (RESHAPED | RESHAPED_WITHOUT_TRAINING)[name]
    if name in RESHAPED_WITHOUT_TRAINING:
        flat = {**flat, "precision": "bf16", "stop_after": STOP}
    return _reshapable(directory, case_of(source), ranks, flat, f"reshaped.{name}")


def case_of(name: str) -> str:
    return SAVED[name][1] if name in SAVED else case_of((RESHAPED | RESHAPED_WITHOUT_TRAINING)[name][1])


def ancestors(directory: Path, name: str) -> list[Config]:
    """Return the runs that a reshaped run continues, the most recent one first."""
    _, source, _ = (RESHAPED | RESHAPED_WITHOUT_TRAINING)[name]
    if source in SAVED:
        return [saved(directory, source)]
    return [reshaped(directory, source), *ancestors(directory, source)]


def _reshapable(directory: Path, case: str, ranks: int, flat: dict[str, Any], name: str) -> Config:
    length = {"max_examples": 40, "steps": END, "evaluate": False}
    return config(directory, **{"dp": ranks // flat.get("tp", 1), **CASES[case], **length, **flat, "name": name})


def reshaped_runs(directory: Path, ranks: int) -> list[ProbedRun]:
    """Return all runs that continue in a different shape on this many ranks, each in a copy of the saved run."""
    runs = []
    for name, (needed, *_) in (RESHAPED | RESHAPED_WITHOUT_TRAINING).items():
        if needed == ranks:
            (before, *_) = ancestors(directory, name)
            runs.append(ProbedRun(copy_run(before, reshaped(directory, name))))
    for fault, name in RESHAPE_FAULTS.items():
        if RESHAPED[name][0] == ranks:
            (before, *_) = ancestors(directory, name)
            again = reshaped(directory, name).override(name=fault)
            runs.append(ProbedRun(copy_run(before, again), Probe(fault=fault)))
    if ranks == 2:
        for name in RESHAPED_TWICE:
            shape = {"engine": "fsdp", "model": "gpt2-dropout"}
            again = _reshapable(directory, "gpt2", 2, shape, f"reshaped.{name}")
            runs.append(ProbedRun(copy_run(saved(directory, "dropout"), again)))
    return runs
