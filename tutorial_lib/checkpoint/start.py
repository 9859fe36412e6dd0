"""Start of a run: from step 0, or from its newest intact checkpoint, which must be compatible."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.checkpoint.compatibility import DataIdentity, check_continues, identity, reads_data
from tutorial_lib.checkpoint.directory import LeftOut, clean_up_leftovers, newest_intact
from tutorial_lib.checkpoint.lock import training_lock
from tutorial_lib.checkpoint.manifest import read_trainer_state
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import barrier
from tutorial_lib.records import RunDirectory

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a run: its checkpoint, found and checked.

    Attributes:
        found: the intact checkpoint that it resumes from, or None.
        left_out: newer checkpoints that are damaged.
        reads_data: whether it trains or evaluates; a reshape does neither, and needs no data.
        identity: identity of model, tokenizer and data, for the checkpoints of this start; empty except on rank 0.
    """

    found: Path | None
    left_out: list[LeftOut]
    reads_data: bool
    identity: dict[str, Any]

    def saved_num_steps(self) -> int:
        """Return the run's total number of steps, as its checkpoint records it."""
        assert self.found is not None
        return int(read_trainer_state(self.found)["record"]["num_steps"])


def find_start(config: Config, topology: Topology, data: DataIdentity) -> Start:
    """Find the checkpoint that a run resumes from, read every byte of it, and compare it with the run. Collective.

    Args:
        config: what to run.
        topology: this rank's place in the grid.
        data: returns the hashes of the run's data; only called if this start reads data.

    Raises:
        ConfigError: the run cannot resume from its checkpoint, because settings, model or data differ.
        CheckpointError: there are checkpoints, but none is intact.
    """
    run = RunDirectory(config.directory)
    if topology.rank == 0:
        clean_up_leftovers(run)
    found, left_out = newest_intact(run, topology)
    needs_data = reads_data(config.run, found)
    hashes = functools.cache(data) if needs_data else None
    if found:
        check_continues(config, found, hashes)
    own: dict[str, Any] = {}
    if topology.rank == 0:
        for each in left_out:
            _LOG.warning("Not resumed from %s: %s Resuming from %s.", each.checkpoint, each.why, found)
        known = read_trainer_state(found).get("identity", {}).get("data", {}) if found else {}
        own = identity(config.model) | {"data": known | (hashes() if hashes else {})}
    return Start(found, left_out, needs_data, own)


@contextmanager
def opened_for_training(run: RunDirectory, topology: Topology) -> Iterator[None]:
    """Create a run's directory, and keep other starts of the run out while the block runs. Collective.

    Raises:
        ConfigError: another start of the run has not ended, or this rank does not see the directory.
    """
    if topology.rank == 0:
        run.create()
    with training_lock(run, topology):
        barrier()
        if not run.logs.is_dir():
            raise ConfigError(
                f"Rank {topology.rank} does not see {run.path}. The storage must be a directory that every node sees, "
                "such as one on a network file system: choose another one."
            )
        yield
