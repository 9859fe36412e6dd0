"""How processes start: here, under Ray Train, or by somebody else (torchrun, srun).

All launchers call :func:`tutorial_lib.trainer.train` on every rank and differ in nothing else. What can be refused is
refused by :func:`preflight`, before any process starts.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.doctor.machine import MEMORY_TO_START_GB, available_memory_gb
from tutorial_lib.records import STOPPING, Row, RunDirectory

OnRows = Callable[[list[Row]], None]
"""Called in the launching process with the metrics rows that have come since the last call."""

_POLL_SECONDS = 0.2


class WorkerError(RuntimeError):
    """A worker failed. The message is the failing rank's own traceback."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended.

    Attributes:
        config: what was run.
        result: what ``result.json`` holds.
        rows: what ``metrics.jsonl`` holds, a row per optimizer step.
    """

    config: Config
    result: dict[str, Any]
    rows: list[Row]

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.config.directory)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, a notebook's Interrupt or a signal cut a launch short.

    It is a KeyboardInterrupt, so that neither a script nor *Run All* continues as if nothing had happened.

    Attributes:
        runs: the runs that had begun; each has saved. Empty if the request came before the first one.
    """

    def __init__(self, message: str, runs: Sequence[Run]) -> None:
        super().__init__(message)
        self.runs = list(runs)


def warm_up(config: Config) -> None:
    """Start loading libraries for runs like this one in the background, so that the first run starts sooner.

    Args:
        config: its launcher and device decide what is loaded. It is not checked, so it may still be incomplete.
    """
    if config.run.launcher == "local":
        from tutorial_lib.launch import local

        local.warm_up(config.run.device)
    elif config.run.launcher == "ray":
        from tutorial_lib.launch.ray import train as ray_train

        ray_train.warm_up(config)


def run(config: Config, *, on_rows: OnRows | None = None) -> Run:
    """Run or continue one training run with the launcher that the configuration names.

    Raises:
        ConfigError: the configuration cannot run here; no rank was started.
        WorkerError: a worker failed; the message is its own traceback.
        Interrupted: Ctrl-C was pressed, or a signal came before the run began. A run that had begun has saved.
    """
    return run_all([config], on_rows=on_rows)[0]


def reshape(source: Path, **flat: Any) -> Run:
    """Make a run whose checkpoint is that of another, saved in another shape, by ranks of that shape.

    Training goes on in another shape without it: a run resumes in any. This writes the checkpoint and trains nothing,
    and it leaves the old run as it is.

    Args:
        source: a run's directory (its newest checkpoint), or one checkpoint.
        flat: ``name`` of the new run, and settings that differ (see :func:`tutorial_lib.checkpoint.reshaped_config`).

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: the settings cannot run or would make other updates, or a run of this name exists.
        WorkerError: a worker failed; there is no new run.
    """
    from tutorial_lib import checkpoint

    source = checkpoint.checkpoint_of(source)
    config = checkpoint.reshaped_config(source, flat)
    with checkpoint.staged(source, config) as start:
        run(start)
    directory = RunDirectory(config.directory)
    return Run(config, directory.result(), directory.rows())


def run_all(configs: Sequence[Config], *, on_rows: OnRows | None = None, worker: str | None = None) -> list[Run]:
    """Run several configurations one after the other, in the same processes, because starting them takes longest.

    Args:
        configs: all ask for the same launcher, device and number of processes, and have names of their own.
        on_rows: called with new metrics rows.
        worker: with the local launcher, the module that each rank runs in place of ``tutorial_lib.launch.worker``.

    Raises:
        Interrupted: Ctrl-C was pressed, or a signal came before the last run had begun. The run under way, if any,
            has saved; the runs after it have not begun.
    """
    first = configs[0]
    warm_up(first)
    if worker and first.run.launcher != "local":
        raise ValueError(f"worker={worker!r} is for launcher='local'; launcher={first.run.launcher!r} has its own.")
    from tutorial_lib.checkpoint import held_for_launch

    configs = [preflight(config) for config in configs]
    first = configs[0]
    if len(configs) > 1 and any(config.run.max_failures for config in configs):
        raise ConfigError(
            "max_failures works with a single run only; otherwise it would be unclear which run failed. "
            "Start them separately."
        )
    for config in configs[1:]:
        for what in ("launcher", "device"):
            if getattr(config.run, what) != getattr(first.run, what):
                raise ConfigError(
                    f"Runs {first.run.name!r} and {config.run.name!r} differ in {what}: start them separately."
                )
        if config.parallel.world_size != first.parallel.world_size:
            raise ConfigError(
                f"Runs {first.run.name!r} and {config.run.name!r} need {first.parallel.world_size} and "
                f"{config.parallel.world_size} processes: start them separately."
            )
    if len({config.directory.resolve() for config in configs}) < len(configs):
        raise ConfigError("Two runs have the same name and storage: each needs a name of its own.")
    directories = [RunDirectory(config.directory) for config in configs]
    with ExitStack() as held:
        for directory in directories:
            held.enter_context(held_for_launch(directory))
        signals: list[int] = []
        watched = _Watcher(directories, on_rows, signals)
        if first.run.launcher != "none" or "RANK" not in os.environ:  # under torchrun, rank 0 alone may do so
            for directory in directories:
                directory.create()
                directory.clear_requests()
        earlier = [_stamp(directory.result_file) for directory in directories]
        held.enter_context(_stop_on_signal(watched))
        if first.run.launcher == "ray":
            from tutorial_lib.launch.ray.train import launch

            launch(configs, watched.poll)
        elif first.run.launcher == "local":
            from tutorial_lib.launch import local

            local.launch(configs, watched.poll, worker or local.WORKER)
        else:
            from tutorial_lib.launch.torchrun import launch as join

            begun = join(configs)
        watched.poll()
    if first.run.launcher != "none":
        begun = sum(_stamp(d.result_file) not in (None, before) for d, before in zip(directories, earlier, strict=True))
    runs = [Run(c, d.result(), d.rows()) for c, d in zip(configs[:begun], directories, strict=False)]
    interrupted = signal.SIGINT in signals or any(r.result.get("stopped_by") == "SIGINT" for r in runs)
    if len(runs) < len(configs) or interrupted:
        raise Interrupted(_where_stopped(runs, configs), runs)
    return runs


def preflight(config: Config) -> Config:
    """Everything that can be refused before a process starts.

    Returns:
        The configuration with the settings that its DeepSpeed file decides, and with absolute paths.

    Raises:
        ConfigError: names what cannot run here and what to write instead.
        CheckpointError: there are checkpoints, and none of them can be continued.
    """
    from tutorial_lib.checkpoint import check_continues, check_free, check_storage, latest, reads_data
    from tutorial_lib.dataloader import data_identity, load_rows
    from tutorial_lib.engine.deepspeed.config import apply_file
    from tutorial_lib.engine.deepspeed.config import check_tensor_parallel as check_autotp
    from tutorial_lib.models import (
        check_sequence_length,
        check_tensor_parallel,
        load_config,
        load_tokenizer,
        load_trained_config,
    )

    config = apply_file(config.with_absolute_paths())
    if config.run.launcher != "ray" and config.run.device == "cuda":
        _check_gpus(config)
    if config.run.launcher == "local" or (config.run.launcher == "ray" and not os.environ.get("RAY_ADDRESS")):
        _check_memory(config)
    m = config.model
    model = load_config(m.name, trust_remote_code=m.trust_remote_code)
    check_sequence_length(config.data.seq_length, model)
    if config.parallel.tp > 1:  # an output layer with a weight of its own is split as well
        model = load_trained_config(m.name, random_init=m.random_init, trust_remote_code=m.trust_remote_code)
    check_tensor_parallel(config.parallel.tp, model)
    if config.engine.name == "deepspeed":
        check_autotp(config, model)
    check_storage(config)
    check_free(RunDirectory(config.directory))
    found = latest(RunDirectory(config.directory))
    here = reads_data(config, found)
    if here:
        load_rows(config.data.name, config.data.train_split, max_examples=1)
        if config.run.evaluate:
            load_rows(config.data.name, config.data.eval_split, max_examples=1)
    if found:
        tokenizer = load_tokenizer(m.name, trust_remote_code=m.trust_remote_code)
        # Under Ray the workers may have the tokens, and this machine not: they compare.
        compares = here and config.run.launcher != "ray"
        check_continues(config, found, (lambda: data_identity(config, tokenizer)) if compares else None)
    return config


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is written again, or None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _where_stopped(runs: Sequence[Run], configs: Sequence[Config]) -> str:
    if not runs:
        return "stopped before training began; no step was run. Run it again to start or resume."
    last = runs[-1]
    not_begun = [config.run.name for config in configs[len(runs) :]]
    more = f"; not begun: {', '.join(not_begun)}" if not_begun else ""
    if last.result["status"] == "completed":
        return f"run {last.config.run.name!r} had completed when the interrupt came{more}."
    where = f"stopped at step {last.result['step']} of {last.result['num_steps']} and was saved"
    return f"run {last.config.run.name!r} {where}{more}. Run it again to go on from there."


def first_error(directories: Sequence[RunDirectory], otherwise: str) -> Exception:
    """The error of the rank that failed first, or ``otherwise`` if no rank could write one."""
    for directory in directories:
        record = directory.first_error()
        if record and record["type"] == ConfigError.__name__:
            return ConfigError(record["message"])
        if record:
            return WorkerError(
                f"Rank {record['rank']} of run {directory.path.name!r} failed with {record['type']}: "
                f"{record['message']}\n\n{record['traceback']}\nIts output: {directory.log_file(record['rank'])}"
            )
    return WorkerError(otherwise)


def next_start(directories: Sequence[RunDirectory]) -> str:
    """What a start of the same runs would do."""
    from tutorial_lib.checkpoint import CheckpointError, next_start_from

    try:
        found = {directory.path.name: next_start_from(directory) for directory in directories}
    except CheckpointError as error:
        return str(error)
    where = ", ".join(f"{name!r} from {start or 'step 0'}" for name, start in found.items())
    return f"Given the same command again, it goes on: {where}."


def _check_gpus(config: Config) -> None:
    import torch

    found = torch.cuda.device_count()
    needed = config.parallel.world_size if config.run.launcher == "local" else 1
    if found < needed:
        raise ConfigError(
            f"device='cuda' and {config.parallel.world_size} processes need {needed} GPUs here, and this machine has "
            f"{found}. Write profile='cpu', or a smaller dp. `python -m tutorial_lib doctor` shows what would run."
        )


def _check_memory(config: Config) -> None:
    """Refuse more processes than this machine has memory for: the kernel would end some of them, or other programs."""
    world_size, available = config.parallel.world_size, available_memory_gb()
    possible = int(available / MEMORY_TO_START_GB)
    if world_size > possible:
        raise ConfigError(
            f"{world_size} processes need about {world_size * MEMORY_TO_START_GB:.0f} GB of memory to start, and "
            f"{available:.1f} GB are free here. Write dp x tp of at most {possible}, or close other programs."
        )


class _Watcher:
    """Passes new rows of the metrics files to the caller, and tells the user that an interrupt was noticed."""

    def __init__(self, directories: list[RunDirectory], on_rows: OnRows | None, signals: list[int]) -> None:
        self.directories = directories
        self.on_rows = on_rows
        self.signals = signals
        self._has_said = False
        self._seen = {directory.path: self._last_step(directory) for directory in directories}
        self._sizes: dict[Path, int] = {}

    def poll(self) -> None:
        if signal.SIGINT in self.signals and not self._has_said:
            self._has_said = True
            print(STOPPING, file=sys.stderr, flush=True)
        if self.on_rows is None:
            return
        for directory in self.directories:
            try:
                size = directory.metrics_file.stat().st_size
            except FileNotFoundError:  # not there yet, or removed by a start from step 0
                size = 0
            if self._sizes.get(directory.path) == size:
                continue  # five times a second, a long run's file is not read for nothing
            self._sizes[directory.path] = size
            new = [row for row in directory.rows() if row["step"] > self._seen[directory.path]]
            if new:
                self._seen[directory.path] = new[-1]["step"]
                self.on_rows(new)

    @staticmethod
    def _last_step(directory: RunDirectory) -> int:
        # Rows after the newest checkpoint will be written again; those before it are history.
        from tutorial_lib.checkpoint import latest

        found = latest(directory) if directory.checkpoints.is_dir() else None
        return int(found.name.removeprefix("step-")) if found else 0


def wait_for(thread: threading.Thread, *calls: Callable[[], None]) -> None:
    """Call each of ``calls`` every 0.2 s until the thread ends or one of them raises."""
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        for call in calls:
            call()


@contextmanager
def _stop_on_signal(watched: _Watcher) -> Iterator[None]:
    """Pass a stop request on to the workers: they save at the next step, and the launch ends normally."""
    if threading.current_thread() is not threading.main_thread() or "RANK" in os.environ:
        yield
        return

    def request_stop(number: int, _frame: Any) -> None:
        watched.signals.append(number)
        for directory in watched.directories:
            directory.logs.parent.mkdir(parents=True, exist_ok=True)
            directory.stop_file.write_text(f"signal {number} at {time.time()}\n")
        # A second signal means now.
        signal.signal(number, before[signal.Signals(number)])

    # What is ignored stays ignored, as SIGINT is in the background of a shell.
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request_stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for directory in watched.directories:
            directory.stop_file.unlink(missing_ok=True)
