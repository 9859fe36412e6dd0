"""Records of a run: the files under ``STORAGE/RUN``, written by its workers and read by everything else.

Workers write records instead of printing; notebooks, tests and the command line read them. The main files are

``config.json``
    every setting of the run by its flat name;
``metrics.jsonl``
    one row per optimizer step: ``step, epoch, loss, tokens, grad_norm, lr, seconds``;
``result.json``
    how the run ended: losses, speed, memory per rank, versions;
``restarts.json``
    under Ray, the ranks that failed, and the steps from which the run continued;
``checkpoints/step-NNNNNNNN/``
    see :mod:`tutorial_lib.checkpoint`;
``.lock``, ``.launch.lock``
    held while the run trains, and while its launcher runs: see :mod:`tutorial_lib.checkpoint.lock`;
``.stop-requested``
    asks the ranks to save and stop;
``logs/rank-NNN.log``, ``logs/rank-NNN.error.json``
    a worker's output, and its traceback if it failed;
``logs/memory-rank-NNN.jsonl``, ``logs/memory-JOB.START-NODE.jsonl``
    with ``memory_log_seconds``, a rank's memory over time; under SLURM, the memory of a node's processes: see
    :mod:`tutorial_lib.measure.memory_sampler`.

This module imports only the standard library and the configuration, so that reading a record is cheap.
"""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.config import ConfigError

Row = dict[str, Any]

STOPPING_MESSAGE = "Stopping: saving after this step. Interrupt again to stop now, without saving."
"""Message printed when an interrupt arrives."""

_SIGNS_OF_A_LOST_RANK = ("gloo/transport", "remote process exited", "ncclRemoteError")
"""Parts of the errors with which gloo and NCCL report that a peer is gone or does not answer."""


def lost_another_rank(error: Mapping[str, Any]) -> bool:
    """Return whether a rank failed only because another one was gone or did not answer.

    Args:
        error: a record that :meth:`RunDirectory.write_error` has saved.
    """
    return any(sign in error["message"] for sign in _SIGNS_OF_A_LOST_RANK)


STEPS_UNTIL_MEASURED = 3
"""By a start's third step, buffers and optimizer states exist, and ZeRO-3 has traced the order of its parameters."""


def typical_rows(result: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose seconds are typical: no measured step, and no first step of a start, which allocates.

    Args:
        result: content of ``result.json``.
        rows: rows of ``metrics.jsonl``. Of its starts, only the first, the newest and Ray's restarts in the same launch
            are known.
    """
    restarts = [restart["from_step"] for restart in result.get("restarts", ()) if "from_step" in restart]
    starts = {0, result.get("resumed_from") or 0, *restarts}
    left_out = {start + 1 for start in starts}
    if measured := result["ranks"][0]["measured"]:
        left_out |= {measured.get("step"), *(start + STEPS_UNTIL_MEASURED for start in starts)}
    return [row for row in rows if row["step"] not in left_out]


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content so that a reader sees the old text or the new one, never a mix."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _version(file: Path) -> tuple[int, int, int] | None:
    """Return a value that changes with the file's content, or None if there is no file."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


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
        """Return the metrics rows written so far, in step order, without a line that is still being written.

        Raises:
            ConfigError: a line is not a row, because the file was edited or damaged.
        """
        try:
            lines = self.metrics_file.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return []
        rows = []
        for number, line in enumerate(lines[:-1], 1):
            try:
                rows.append(dict(json.loads(line)))
                int(rows[-1]["step"])
            except (ValueError, TypeError, KeyError) as error:
                why = f"it has no {error}" if isinstance(error, KeyError) else error
                raise ConfigError(
                    f"{self.metrics_file}, line {number} is not a row of metrics: {why}. Remove it."
                ) from error
        return rows

    def metrics_version(self) -> tuple[int, int, int] | None:
        """Return a value that changes whenever a row is added or removed, or None if there is no ``metrics.jsonl``."""
        return _version(self.metrics_file)

    def append(self, row: Row) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def keep_rows_until(self, step: int) -> None:
        """Drop the rows of steps after ``step``: the run resumes from there and writes them again."""
        kept = {row["step"]: row for row in self.rows() if row["step"] <= step}
        write_atomically(self.metrics_file, "".join(json.dumps(kept[number]) + "\n" for number in sorted(kept)))

    def result(self) -> dict[str, Any]:
        """Return the content of ``result.json``.

        Raises:
            FileNotFoundError: the run has not ended, or never started.
        """
        return dict(json.loads(self.result_file.read_text(encoding="utf-8")))

    def result_version(self) -> tuple[int, int, int] | None:
        """Return a value that changes whenever ``result.json`` is rewritten, or None if there is none."""
        return _version(self.result_file)

    def log_file(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:03d}.log"

    def memory_log(self, rank: int) -> Path:
        return self.logs / f"memory-rank-{rank:03d}.jsonl"

    def write_error(self, rank: int, error: BaseException) -> None:
        """Save a worker's own traceback, and the time it failed, where the launcher looks for them."""
        record = {
            "rank": rank,
            "node": socket.gethostname(),
            "time": time.time(),
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_atomically(self.logs / f"rank-{rank:03d}.error.json", json.dumps(record))

    def first_error(self) -> dict[str, Any] | None:
        """Return the error of the rank that failed first: the errors of other ranks usually follow from it.

        Errors that only report a lost rank come last, because the clocks of nodes may differ.
        """
        return min(self.errors(), key=lambda record: (lost_another_rank(record), record["time"]), default=None)

    def errors(self) -> list[dict[str, Any]]:
        """Return the errors that :meth:`write_error` saved since the workers last started, earliest first."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in self.logs.glob("rank-*.error.json")]
        return sorted(found, key=lambda record: record["time"])

    def clear_requests(self) -> None:
        """Delete errors, restarts and stop requests of an earlier launch of the same run."""
        self.clear_errors()
        for path in (self.stop_file, self.restarts_file):
            path.unlink(missing_ok=True)

    def clear_errors(self) -> None:
        for path in self.logs.glob("rank-*.error.json"):
            path.unlink(missing_ok=True)

    def restarts(self) -> list[dict[str, Any]]:
        """Return the failures of this launch after which its workers were restarted, oldest first.

        Each has ``time`` (seconds since 1970), ``failed`` (rank and error) and, once the new workers are running,
        ``from_step``, the step they resumed from.
        """
        if not self.restarts_file.exists():
            return []
        return list(json.loads(self.restarts_file.read_text(encoding="utf-8")))

    def write_restarts(self, restarts: list[dict[str, Any]]) -> None:
        write_atomically(self.restarts_file, json.dumps(restarts, indent=2) + "\n")
