"""What a run leaves behind under ``STORAGE/RUN``, and how it is read back.

Workers write records, they do not print; notebooks, tests and the command line read them. The files are

``config.json``
    every setting of the run by its flat name;
``metrics.jsonl``
    a row per optimizer step: ``step, epoch, loss, tokens, grad_norm, lr, seconds``;
``result.json``
    how the run ended: losses, speed, memory per rank, versions;
``checkpoints/step-NNNNNNNN/``
    see :mod:`tutorial_lib.checkpoint`;
``.lock``, ``.launch.lock``
    held while the run trains, and while its launcher runs: see :mod:`tutorial_lib.checkpoint.lock`;
``logs/rank-NNN.log``, ``logs/rank-NNN.error.json``
    a worker's output, and the traceback of one that failed;
``logs/memory-JOB.START-NODE.jsonl``
    under SLURM, what a node's processes hold over time: see :mod:`tutorial_lib.measure.sampler`.

Nothing here imports more than the standard library, so that reading a record costs little.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

STOPPING = "Stopping: saving after this step. Interrupt again to stop now, without saving."
"""Message printed when an interrupt arrives."""


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content so that a reader sees the old or the new text, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory of one run. Nothing is created before :meth:`create`."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def stop_file(self) -> Path:
        return self.path / ".stop-requested"

    @property
    def restarts_file(self) -> Path:
        return self.path / "restarts.json"

    def create(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)

    def rows(self) -> list[Row]:
        """The metrics rows written so far, in step order. A line still being written is left out."""
        try:
            lines = self.metrics_file.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines[:-1]]

    def append(self, row: Row) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def keep_rows_until(self, step: int) -> None:
        """Drop the rows of steps after ``step``: the run goes on from there and writes them again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_atomically(self.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))

    def result(self) -> dict[str, Any]:
        """What ``result.json`` holds.

        Raises:
            FileNotFoundError: the run has not ended, or never began.
        """
        return dict(json.loads(self.result_file.read_text(encoding="utf-8")))

    def log_file(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:03d}.log"

    def write_error(self, rank: int, error: BaseException) -> None:
        """Keep a worker's own traceback where the launcher finds it, with the time at which it failed."""
        record = {
            "rank": rank,
            "time": time.time(),
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_atomically(self.logs / f"rank-{rank:03d}.error.json", json.dumps(record))

    def first_error(self) -> dict[str, Any] | None:
        """The record of the rank that failed first: the others' errors are usually its consequence."""
        return next(iter(self.errors()), None)

    def errors(self) -> list[dict[str, Any]]:
        """Return the errors that :meth:`write_error` has kept of this launch, earliest first."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in self.logs.glob("rank-*.error.json")]
        return sorted(found, key=lambda record: record["time"])

    def clear_requests(self) -> None:
        """Forget errors, restarts and stop requests of an earlier launch of the same run."""
        self.clear_errors()
        for path in (self.stop_file, self.restarts_file):
            path.unlink(missing_ok=True)

    def clear_errors(self) -> None:
        for path in self.logs.glob("rank-*.error.json"):
            path.unlink(missing_ok=True)

    def restarts(self) -> list[dict[str, Any]]:
        """The failures of this launch after which its workers were started again, the oldest first.

        Each has ``time`` (seconds since 1970), ``failed`` (rank and error) and, once the workers are there again,
        ``from_step``, the step that they went on from.
        """
        if not self.restarts_file.exists():
            return []
        return list(json.loads(self.restarts_file.read_text(encoding="utf-8")))

    def write_restarts(self, restarts: list[dict[str, Any]]) -> None:
        write_atomically(self.restarts_file, json.dumps(restarts, indent=2) + "\n")
