"""Runs that share a launch, because starting processes takes longer than a run."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.cases.equivalence import (
    CASES,
    MUTANTS,
    ONE_STEP_WITHOUT_UPDATE,
    SELF_DETECTED_FAULTS,
    SHARDED,
    VARIANTS,
    one_step_without_update,
    reference,
    variant,
)
from tests.distributed.cases.interruption import (
    ASYNC_SAVED,
    INTERRUPTED,
    INTERRUPTED_ON_4,
    async_saved,
    interrupted,
    uninterrupted,
)
from tests.distributed.cases.reshaping import RESHAPE_CASES, SAVED, saved, uninterrupted_torch
from tests.distributed.observing.probe import Probe, ProbedRun


def shared_runs(directory: Path, ranks: int) -> list[ProbedRun]:
    """Return all runs on this many ranks that can share a launch."""
    runs = [
        ProbedRun(variant(directory, case, name, ranks)) for case, names in VARIANTS[ranks].items() for name in names
    ]
    if ranks == 1:
        runs += [ProbedRun(reference(directory, case)) for case in CASES]
        runs += [ProbedRun(uninterrupted_torch(directory, case)) for case in RESHAPE_CASES]
    if ranks == 2:
        for kind in INTERRUPTED:
            runs += [
                ProbedRun(uninterrupted(directory, kind), Probe(load_nothing=True)),
                ProbedRun(interrupted(directory, kind)),
            ]
        for name in SHARDED:
            again = variant(directory, "gpt2", name, 2, name=f"fsdp1.{name}", measure=False)
            runs.append(ProbedRun(again, Probe(engine="fsdp1")))
        for fault, (case, name) in MUTANTS.items():
            runs.append(ProbedRun(variant(directory, case, name, 2, name=fault), Probe(fault=fault)))
        for fault, (case, name, changes) in SELF_DETECTED_FAULTS.items():
            broken = variant(directory, case, name, 2, name=fault, **changes)
            runs.append(ProbedRun(broken, Probe(fault=fault, must_fail=True)))
        runs.append(async_saved(directory, "zero1", no_snapshot=True))
    runs += [async_saved(directory, kind) for kind in ASYNC_SAVED.get(ranks, ())]
    if ranks == 4:
        runs += [ProbedRun(one_step_without_update(directory, name)) for name in ONE_STEP_WITHOUT_UPDATE]
        for kind in INTERRUPTED_ON_4:
            runs += [
                ProbedRun(uninterrupted(directory, kind), Probe(load_nothing=True)),
                ProbedRun(interrupted(directory, kind, name=f"restarted.{kind}"), Probe(start_twice=True)),
            ]
    runs += [ProbedRun(saved(directory, name)) for name, (needed, *_) in SAVED.items() if needed == ranks]
    return runs
