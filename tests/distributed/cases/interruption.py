"""Interrupted runs: they stop in the middle of an epoch, and must resume as if they had not stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.distributed.cases.small_runs import config, copy_run
from tests.distributed.observing.probe import Probe, ProbedRun
from tests.support.damaged_files import flip_a_bit, shard
from tutorial_lib import checkpoint
from tutorial_lib.config import Config
from tutorial_lib.records import RunDirectory

STOP, END = 3, 8
INTERRUPTED: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2-optimizer": {"zero_stage": 2, "offload": "optimizer"},
    "zero3": {"zero_stage": 3},
    "zero3-all": {"zero_stage": 3, "offload": "all"},
    "zero0-bf16": {"zero_stage": 0, "precision": "bf16"},
    "zero3-bf16": {"zero_stage": 3, "precision": "bf16"},
    "fsdp-full": {"engine": "fsdp"},
    "packed": {"zero_stage": 2, "model": "bloom-dropout", "batching": "packed", "seq_length": 128, "micro_batch": 2},
    "1x2-zero0": {"zero_stage": 0, "model": "bloom-dropout", "dp": 1, "tp": 2},
    "1x2-zero2": {"zero_stage": 2, "model": "bloom-dropout", "dp": 1, "tp": 2},
}  # fmt: skip
"""Runs with dropout that stop in the middle of an epoch of five steps, and end in the middle of the next."""

INTERRUPTED_ON_4: dict[str, dict[str, Any]] = {
    "2x2-zero1": {"zero_stage": 1, "model": "bloom-dropout", "dp": 2, "tp": 2},
    "2x2-zero3": {"zero_stage": 3, "model": "bloom-dropout", "dp": 2, "tp": 2},
    "fsdp-tp2": {"engine": "fsdp", "tp": 2},
}
"""Runs of the same kind on four ranks, which are resumed in the same launch."""

ASYNC_SAVED: dict[int, tuple[str, ...]] = {
    2: ("zero1", "zero3", "fsdp-full", "1x2-zero2"),
    4: ("2x2-zero1", "fsdp-tp2"),
}
"""Runs that save during training, stop, and resume in the same launch, by number of ranks."""

RESUME_FAULTS = {
    "restore.random_states_not_restored": "zero1",
    "restore.position_not_restored": "zero1",
    "restore.optimizer_not_restored": "zero1",
}
"""Deliberate faults in a resume, and the kind of run for each. The run with a fault has the fault's name."""

ALTERED = {"altered.position": "zero3", "altered.shard": "zero3", "altered.metadata": "fsdp-full"}
"""Runs with one bit flipped in a file of their checkpoint, and the kind of each."""

DIVERGING = {"learning_rate": 1e30, "checkpoint_every": 1}


def uninterrupted(directory: Path, kind: str, **changes: Any) -> Config:
    """Return a run of the given kind, without the interruption."""
    flat = {"model": "gpt2-dropout", "max_examples": 40, "steps": END, **(INTERRUPTED | INTERRUPTED_ON_4)[kind]}
    if flat.get("batching") == "packed":
        # Enough documents to fill five steps of eight rows, with several documents in each row.
        flat["max_examples"] = 90
    return config(directory, **{"name": f"uninterrupted.{kind}", "dp": 2, **flat, **changes})


def interrupted(directory: Path, kind: str, **changes: Any) -> Config:
    """Return the same run, stopped in the middle."""
    return uninterrupted(directory, kind, **{"name": f"interrupted.{kind}", "stop_after": STOP, **changes})


def async_saved(directory: Path, kind: str, *, no_snapshot: bool = False) -> ProbedRun:
    """Return a run whose background writes are late, resumed from a checkpoint that was written during training."""
    name = f"no_snapshot.{kind}" if no_snapshot else f"async_saved.{kind}"
    asked = interrupted(directory, kind, name=name, checkpoint_every=2, async_save=True)
    return ProbedRun(asked, Probe(late_writes=True, no_snapshot=no_snapshot))


def resumed_runs(directory: Path) -> list[ProbedRun]:
    """Return second starts of interrupted runs, some of them with a fault or a flipped bit, and a diverging run."""
    second_start = {"stop_after": None}
    runs = [ProbedRun(interrupted(directory, kind, **second_start)) for kind in INTERRUPTED]
    for fault, kind in RESUME_FAULTS.items():
        again = copy_run(interrupted(directory, kind), interrupted(directory, kind, name=fault, **second_start))
        runs.append(ProbedRun(again, Probe(fault=fault)))
    for name, kind in ALTERED.items():
        again = copy_run(interrupted(directory, kind), interrupted(directory, kind, name=name, **second_start))
        runs.append(ProbedRun(again, Probe(must_fail=True)))
    position, metadata = (
        checkpoint.directory_of(RunDirectory(directory / "runs" / name), STOP)
        for name in ("altered.position", "altered.metadata")
    )
    shard_of_1 = shard(directory / "runs" / "altered.shard", STOP, rank=1)
    for file in (shard_of_1, position / "rank-001.pt", metadata / "engine" / ".metadata"):
        flip_a_bit(file)
    # Pretend that the first start was killed after its checkpoint, with two and a half more rows written.
    metrics = directory / "runs" / "interrupted.zero1" / "metrics.jsonl"
    last = json.loads(metrics.read_text().splitlines()[-1])
    lost = "".join(json.dumps(last | {"step": STOP + more, "loss": 99.0}) + "\n" for more in (1, 2))
    metrics.write_text(metrics.read_text() + lost + '{"step": 6, "lo')
    diverging = uninterrupted(directory, "zero2-optimizer", name="diverging", **DIVERGING)
    runs.append(ProbedRun(diverging, Probe(must_fail=True)))
    return runs
