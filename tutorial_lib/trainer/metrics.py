"""Records that rank 0 writes: ``config.json``, ``metrics.jsonl`` and ``restarts.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from tutorial_lib.config import START_ONLY, Config
from tutorial_lib.mpu import Topology
from tutorial_lib.records import Row, RunDirectory, write_atomically


@dataclass(frozen=True, slots=True)
class StepRow:
    """A row of ``metrics.jsonl``: one optimizer step.

    Attributes:
        step: number of the step, from 1.
        epoch: number of its epoch, from 0.
        loss: mean over the step's tokens, on all ranks.
        tokens: number of tokens in the loss, on all ranks.
        grad_norm: the gradient's global 2-norm before clipping; None if fp16 skipped the update.
        lr: the learning rate of the update.
        seconds: the step's duration on rank 0.
    """

    step: int
    epoch: int
    loss: float
    tokens: int
    grad_norm: float | None
    lr: float
    seconds: float


class Records:
    """Writer of a run's records. Only rank 0 writes.

    Args:
        config: the run's settings.
        topology: this rank's place in the grid.

    Attributes:
        restarts: failures of this launch before this start, each with the step that the run resumed from.
        measured_before: each rank's measurements by an earlier start with the same settings, or None; on rank 0.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        self.run, self._config, self._writes = RunDirectory(config.directory), config, topology.rank == 0
        self.restarts: list[dict[str, Any]] = []
        self.measured_before: list[dict[str, Any]] | None = None
        self._last: StepRow | None = None

    def resume(self, step: int) -> None:
        """Drop the rows of later steps, and note where new restarts resumed."""
        if not self._writes:
            return
        if step:
            self.run.keep_rows_until(step)
        self.restarts = self.run.restarts()
        for restart in self.restarts:
            restart.setdefault("from_step", step)
        if self.restarts:
            self.run.write_restarts(self.restarts)

    def begin(self, *, is_resumed: bool) -> None:
        """Write ``config.json``; delete an old result and, unless resumed, old rows."""
        if not self._writes:
            return
        if is_resumed:
            self.measured_before = self._measured_before()
        self.run.result_file.unlink(missing_ok=True)  # first: a result belongs to the settings beside it
        write_atomically(self.run.config_file, self._config.to_json())
        if not is_resumed:
            self.run.metrics_file.unlink(missing_ok=True)

    def _measured_before(self) -> list[dict[str, Any]] | None:
        try:
            saved, result = json.loads(self.run.config_file.read_text(encoding="utf-8")), self.run.result()
            measured = [rank["measured"] for rank in result["ranks"] if rank["measured"]]
        except (OSError, ValueError, KeyError):  # missing or damaged
            return None
        now = json.loads(self._config.to_json())
        same = all(saved.get(name) == value for name, value in now.items() if name not in START_ONLY)
        return measured if same and measured else None

    def add(self, row: StepRow) -> None:
        """Append the row of the step that was just trained."""
        self._last = row
        if self._writes:
            self.run.append(asdict(row))

    def last_row(self) -> Row:
        """Return the newest row, of this start or of an earlier one; empty before the first step."""
        return asdict(self._last) if self._last else next(iter(self.run.rows()[-1:]), {})
