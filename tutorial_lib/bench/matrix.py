"""Matrix of runs: run and measure one row after another, save after each, and continue where it stopped."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from tutorial_lib import launch
from tutorial_lib.bench import figures, table
from tutorial_lib.bench.experiments import IS_SCALING, rows_of
from tutorial_lib.bench.failures import count_oom_kills, explain
from tutorial_lib.bench.progress import SilentProgress
from tutorial_lib.bench.record import REFUSED, STOPPED, RowRecord, measure_row, variant_of
from tutorial_lib.config import Config, ConfigError, RunConfig
from tutorial_lib.dataloader.subset import choose_subset
from tutorial_lib.doctor.machine import usable_cores
from tutorial_lib.launch import Interrupted, OnRows, Run, WorkerError
from tutorial_lib.measure.memory_sampler import sample_memory
from tutorial_lib.records import RunDirectory, write_atomically
from tutorial_lib.tables import Table

FORMAT = 1
_LOG = logging.getLogger(__name__)
MATRIX_FILE, MEMORY_LOG = "matrix.json", "memory.jsonl"

_NOT_COMPARED = frozenset({"name", "storage", "resume"})
"""Settings that may change when a matrix is continued."""


class Runner(Protocol):
    """Function that runs a row: :func:`tutorial_lib.launch.run`, or a stand-in for it."""

    def __call__(self, config: Config, *, on_rows: OnRows | None = None) -> Run: ...


@dataclass(frozen=True)
class Matrix:
    """A matrix with its rows, finished or not.

    Attributes:
        experiment: name of the experiment.
        path: directory of the matrix.
        settings: settings that all rows have in common, by flat name.
        rows: the rows, in the order in which they run.
    """

    experiment: str
    path: Path
    settings: dict[str, Any]
    rows: tuple[RowRecord, ...]

    @classmethod
    def read(cls, path: str | Path) -> Matrix:
        """Read the matrix in a directory.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        path = Path(path)
        file = path / MATRIX_FILE
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
            rows = tuple(RowRecord.from_dict(row) for row in given["rows"])
            return cls(given["experiment"], path, given["settings"], rows)
        except FileNotFoundError:
            raise ConfigError(f"{path} has no {MATRIX_FILE}. Name the directory of a matrix that bench made.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} cannot be read ({error}). Remove {path}, or write another name.") from error

    def __getitem__(self, name: str) -> RowRecord:
        """Return the row of this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{self.path.name} has no row {name!r}. Write one of: {', '.join(r.name for r in self.rows)}.")

    def with_row(self, row: RowRecord) -> Matrix:
        """Return a copy of the matrix with one row replaced."""
        return replace(self, rows=tuple(row if row.name == old.name else old for old in self.rows))

    def write(self) -> None:
        """Write ``matrix.json`` atomically: a reader sees either the old or the new one."""
        content = {
            "format": FORMAT,
            "experiment": self.experiment,
            "settings": self.settings,
            "rows": [row.to_dict() for row in self.rows],
        }
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / MATRIX_FILE, json.dumps(content, indent=2) + "\n")

    def write_report(self) -> None:
        """Write ``table.csv``, ``table.md`` and the figures."""
        table.write(self.experiment, self.rows, self.path)
        logs = {row.name: self.memory_log(row.name) for row in self.rows}
        figures.write(self.experiment, self.rows, logs, self.path)

    def table(self, about: Literal["all", "speed", "memory"] = "all", *, only: Sequence[str] = ()) -> Table:
        """Return a table of the rows, which a notebook displays as HTML.

        Args:
            about: the columns to show: all, or only those about speed or memory.
            only: titles of the columns to show, in this order; default: all of them.

        Raises:
            ValueError: there is no such column.
        """
        return table.build(self.experiment, self.rows, about, only)

    def run_directory(self, row: str) -> RunDirectory:
        """Return the run directory of a row."""
        return RunDirectory(self.path / "rows" / self[row].name)

    def memory_log(self, row: str) -> Path:
        """Return the path of the sampler's log of a row."""
        return self.run_directory(row).path / MEMORY_LOG

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.table()._repr_mimebundle_()


def run_matrix(
    experiment: str,
    config: Config,
    *,
    rows: Sequence[str] = (),
    retry: bool = False,
    sample_interval: float = 0.5,
    keep_checkpoints: bool = False,
    run: Runner = launch.run,
    progress: SilentProgress | None = None,
) -> Matrix:
    """Run a matrix, or the rest of it, and write its table and figures.

    Finished rows are not run again. An interrupted row starts over. A failed row is only run again with ``retry``.

    Args:
        experiment: ``zero-stages``, ``offload``, ``weak-scaling`` or ``strong-scaling``.
        config: the settings that all rows have in common. Its name is the name of the matrix. In ``weak-scaling``, the
            global batch is per rank.
        rows: names of the rows to run, see :func:`tutorial_lib.bench.experiments.rows_of`; default: all.
        retry: run failed rows again.
        sample_interval: seconds between two readings of the memory of the process tree and the GPUs.
        keep_checkpoints: keep the checkpoints of finished rows; they may be large.
        run: function that runs one row.
        progress: display such as a ``MatrixProgress``; default: none.

    Returns:
        The matrix, as it is on disk.

    Raises:
        ConfigError: a row has invalid settings, a matrix of this name has different settings, or no row can run here.
        Interrupted: Ctrl-C was pressed or a signal arrived. Earlier rows are kept; repeat the call to continue.
    """
    _check(config.run, sample_interval)
    config, note = choose_subset(config.with_absolute_paths())
    if note:
        _LOG.warning(note)
    if "measure" not in config.given:
        config = config.replaced(measure=True)
    configs = rows_of(experiment, config, rows)
    _open(experiment, config, configs)  # refuses a wrong name or setting before anything is written
    launch.warm_up(config)
    with (
        _matrix_lock(config.directory),
        _omp_threads(_threads_of_a_rank(experiment, configs)),
        closing(progress or SilentProgress()) as shown,
        _raising_on_signals(),
    ):
        matrix = _open(experiment, config, configs)  # another process may have finished rows before it let go
        left = [name for name in configs if not (matrix[name].is_done or (matrix[name].has_failed and not retry))]
        row: str | None = None
        try:
            matrix.write()
            shown.plan(left)
            for row in left:
                matrix = _run_and_save(matrix, row, configs[row], run, shown, sample_interval, keep_checkpoints)
            if all(each.status == REFUSED for each in matrix.rows):
                raise ConfigError(f"No row can run here. {matrix.rows[0].name}: {matrix.rows[0].error}")
            matrix.write_report()
        except KeyboardInterrupt:
            is_saved = (matrix.path / MATRIX_FILE).exists()
            raise Interrupted(_where_stopped(Matrix.read(matrix.path) if is_saved else matrix, row), []) from None
    return matrix


def _run_and_save(
    matrix: Matrix,
    name: str,
    config: Config,
    run: Runner,
    shown: SilentProgress,
    interval: float,
    keep_checkpoints: bool,
) -> Matrix:
    """Run one row, save its record, and return the matrix with it.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed or a signal arrived. The row is saved as stopped, unless its run completed
            or failed all the same.
    """
    directory = matrix.path / "rows" / name
    try:
        shutil.rmtree(directory, ignore_errors=True)
        shown.begin(name, config.run.steps)
        placed = config.replaced(name=name, storage=str(directory.parent))
        record, was_signalled = _run_row(matrix[name], placed, run, shown.on_rows, interval)
        matrix = matrix.with_row(record)
        matrix.write()
    except KeyboardInterrupt:
        why = "interrupted: the same command runs it again"
        matrix.with_row(RowRecord(name, STOPPED, why, settings=matrix[name].settings)).write()
        raise
    if record.is_done and not keep_checkpoints:
        shutil.rmtree(RunDirectory(directory).checkpoints, ignore_errors=True)
    shown.end(record)
    if was_signalled:
        raise KeyboardInterrupt
    return matrix


def _run_row(
    row: RowRecord, config: Config, run: Runner, on_rows: OnRows | None, interval: float
) -> tuple[RowRecord, bool]:
    """Run one row under the memory sampler.

    Returns:
        The row's record, finished or failed, and whether a signal came without stopping the run.
    """
    log = config.directory / MEMORY_LOG
    kills, began = count_oom_kills(), time.monotonic()
    try:
        with sample_memory(log, interval=interval):
            done = _run_to_its_end(config, run, on_rows)
        seconds, was_signalled = time.monotonic() - began, done.was_signalled
        try:
            record = measure_row(row.name, done, log, wall_seconds=seconds)
        except KeyboardInterrupt:  # the run has completed, so its row is kept
            record, was_signalled = measure_row(row.name, done, log, wall_seconds=seconds), True
        return record, was_signalled
    except Exception as error:
        status, cause = explain(error, count_oom_kills() - kills)
        seconds = time.monotonic() - began
        was_signalled = isinstance(error, WorkerError) and error.was_signalled
        failed = RowRecord(row.name, status, cause, str(error), settings=row.settings, wall_seconds=seconds)
        return failed, was_signalled


def _run_to_its_end(config: Config, run: Runner, on_rows: OnRows | None) -> Run:
    """Run one row, and return its run if that has completed, even if a signal came meanwhile.

    Raises:
        KeyboardInterrupt: Ctrl-C or a signal stopped the run.
    """
    try:
        done = run(config, on_rows=on_rows)
    except Interrupted as interrupted:
        if not interrupted.runs:
            raise
        (done,) = interrupted.runs
    if done.result["status"] == "stopped":  # the run has saved and ended normally
        raise KeyboardInterrupt
    return done


def _check(run: RunConfig, sample_interval: float) -> None:
    if not sample_interval > 0:
        raise ConfigError(f"sample_interval is {sample_interval}. Write a number of seconds above 0, such as 0.5.")
    if run.launcher == "none":
        raise ConfigError(
            "bench starts the processes of each row itself, but launcher='none' expects them to be started by "
            "torchrun. Write launcher='local', or 'ray'."
        )
    if run.steps == 1:
        raise ConfigError(
            "steps=1 leaves nothing to measure: the first step also allocates memory. Write steps=2 or more."
        )


def _open(experiment: str, config: Config, configs: Mapping[str, Config]) -> Matrix:
    """Open the matrix to continue, or create a new one.

    Raises:
        ConfigError: there is a matrix of this name that cannot be continued with these settings.
    """
    path = config.directory
    common = {flag: value for flag, value in json.loads(config.to_json()).items() if flag not in _NOT_COMPARED}
    new = tuple(RowRecord(name, settings=variant_of(row)) for name, row in configs.items())
    if not (path / MATRIX_FILE).exists():
        if RunDirectory(path).config_file.exists():
            raise ConfigError(f"{path} is a run. Write another name for the matrix.")
        return Matrix(experiment, path, common, new)
    old = Matrix.read(path)
    if config.run.resume == "never":
        raise ConfigError(f"{path} is already a matrix, and resume='never' was given. Write another name.")
    if old.experiment != experiment:
        raise ConfigError(
            f"{path} is a {old.experiment} matrix, so it cannot continue as {experiment}. Write another name."
        )
    if changed := [flag for flag, value in common.items() if old.settings.get(flag) != value]:
        was = ", ".join(f"{flag}={old.settings.get(flag)!r} (now {common[flag]!r})" for flag in changed)
        raise ConfigError(
            f"The rows of {path} were run with {was}, and all rows of a matrix must be comparable. Write the old "
            "settings, or another name."
        )
    kept = {row.name: row for row in old.rows}
    return replace(old, rows=tuple(kept.values()) + tuple(row for row in new if row.name not in kept))


def _where_stopped(matrix: Matrix, row: str | None) -> str:
    done = sum(each.is_done for each in matrix.rows)
    if row is None:
        where = "before its first row"
    elif matrix[row].status == STOPPED:
        where = f"in row {row!r}, which will start over"
    else:
        where = f"after row {row!r} ({matrix[row].status})"
    return (
        f"matrix {matrix.path.name!r} stopped {where}; {done} of {len(matrix.rows)} rows are done and kept. "
        "Run the same command again to continue."
    )


def _threads_of_a_rank(experiment: str, configs: Mapping[str, Config]) -> int | None:
    """Return the number of threads for each rank, or None to leave that to the launcher.

    The launcher divides the cores among a run's ranks. In a scaling matrix a rank represents a device, so its share
    must not shrink with more ranks: every rank gets the share that it has in the largest row.
    """
    if experiment not in IS_SCALING or any(config.run.device != "cpu" for config in configs.values()):
        return None
    return max(1, usable_cores() // max(config.parallel.world_size for config in configs.values()))


@contextmanager
def _omp_threads(threads: int | None) -> Iterator[None]:
    """Set ``OMP_NUM_THREADS`` for the ranks, unless the user has set it."""
    if threads is None or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


@contextmanager
def _matrix_lock(path: Path) -> Iterator[None]:
    """Keep other processes out of the same matrix while the block runs."""
    from filelock import FileLock, Timeout

    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / ".bench.lock", timeout=0, fallback_to_soft=False):
            yield
    except Timeout:
        raise ConfigError(f"Another process is running {path}. Wait until it ends, or write another name.") from None


@contextmanager
def _raising_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into a KeyboardInterrupt. While a row runs, its launcher handles them instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
