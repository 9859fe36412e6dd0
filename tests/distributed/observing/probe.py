"""Probes: further instructions for the worker that trains and observes a run.

A probe is given where a run is defined. :func:`observe` writes it next to the run's directory, and
:mod:`tests.distributed.workers.observing` reads it there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tutorial_lib import launch
from tutorial_lib.config import Config

OBSERVATION = "observed.pt"
"""File in a run's directory with the ranks' observations at its newest checkpoint."""

ERRORS = "expected_errors.json"
"""File in a run's directory with the error of each rank, for a run that must fail."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Instructions for the worker that trains and observes a run.

    Attributes:
        fault: train with this deliberate fault, a context manager in :mod:`tests.distributed.injected`. It is given by
            module and name, for example ``"data.padding_in_the_loss"``. A fault in the loop yields a class of trainer.
        engine: train with an engine that is not the library's: ``"fsdp1"``.
        load_nothing: at the end, ask the engine to load an empty directory, and keep its error.
        start_twice: when the run stops, start it again in the same processes, and observe the second start.
        late_writes: write files in the background only after the next step. When the run stops, remove the newest
            checkpoint and start it again, as with ``start_twice``.
        no_snapshot: with ``late_writes``, write the states themselves instead of a snapshot of them.
        must_fail: expect an error on every rank, keep it in :data:`ERRORS`, and let the launch go on.
    """

    fault: str | None = None
    engine: str | None = None
    load_nothing: bool = False
    start_twice: bool = False
    late_writes: bool = False
    no_snapshot: bool = False
    must_fail: bool = False

    def write(self, config: Config) -> None:
        """Write the probe to the file in which the run's worker looks for it."""
        _file_of(config).parent.mkdir(parents=True, exist_ok=True)
        _file_of(config).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, config: Config) -> Probe:
        return cls(**json.loads(_file_of(config).read_text()))


def _file_of(config: Config) -> Path:
    return Path(config.run.storage) / f"{config.run.name}.probe.json"


class ProbedRun(NamedTuple):
    """A run and its probe."""

    config: Config
    probe: Probe = Probe()


def observe(runs: Sequence[ProbedRun]) -> list[launch.Run]:
    """Launch runs with workers that record observations and follow each run's probe."""
    for run in runs:
        run.probe.write(run.config)
    return launch.run_all([run.config for run in runs], worker="tests.distributed.workers.observing")
