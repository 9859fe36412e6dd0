"""A checkpoint of one shape made into one of another, by the ranks of the new shape: they resume, save, and end."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tutorial_lib.checkpoint.compatibility import check_same_run
from tutorial_lib.checkpoint.directory import MANIFEST, directory_of, newest_whole, read_trainer_state
from tutorial_lib.config import ENGINES, OF_ONE_START, Config, ConfigError, settings
from tutorial_lib.records import RunDirectory, write_atomically

_LOG = logging.getLogger(__name__)

_NOT_FOR_EVERY_ENGINE = tuple(name for name, setting in settings().items() if setting.engines != ENGINES)


def checkpoint_of(source: Path) -> Path:
    """The checkpoint that a user names: by its own directory, or by that of a run, which means its newest whole one.

    Newer ones that are damaged are named in a warning.

    Raises:
        CheckpointError: the run has checkpoints, and none of them is whole.
        ConfigError: there is none.
    """
    if (source / MANIFEST).is_file():
        return source
    found, left_out = newest_whole(RunDirectory(source))
    for each in left_out:
        _LOG.warning("left out %s: %s", each.checkpoint, each.why)
    if found is None:
        raise ConfigError(f"{source} is neither a checkpoint nor the directory of a run that has one.")
    return found


def reshaped_config(source: Path, flat: dict[str, Any]) -> Config:
    """The configuration of the run that continues a checkpoint in another shape.

    Args:
        source: the checkpoint.
        flat: settings that differ from those that it was saved with, among them the new run's ``name``. Without
            ``storage``, it lies beside the old one. A change of engine takes the other engine's settings back to
            their defaults, and one of ``zero_stage`` or ``offload`` takes them out of the DeepSpeed file's hands.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the settings cannot run or would make other updates, or a run of this name exists.
    """
    saved = read_trainer_state(source)["config"]
    given = dict(flat)
    if other := sorted(given.keys() & OF_ONE_START):
        raise ConfigError(f"A reshape trains no step: {', '.join(other)} cannot be set. Give it to the training run.")
    if "name" not in given:
        raise ConfigError("A reshape makes a new run: write its name.")
    if given.setdefault("launcher", "local") == "none":
        raise ConfigError(
            "A reshape starts its own processes: write launcher='local' or 'ray'. Under torchrun or srun no reshape is "
            "needed: train on the run as it is, in the shape that is wanted."
        )
    defaults = {name: setting.default for name, setting in settings().items()}
    back: tuple[str, ...] = ()
    if given.get("engine", saved["engine"]) != saved["engine"]:
        back = _NOT_FOR_EVERY_ENGINE
    elif given.keys() & {"zero_stage", "offload"}:
        back = ("deepspeed",)
    elif "sharding" in given:
        back = ("shard_size",)
    base = saved | {name: defaults[name] for name in (*back, *OF_ONE_START)}
    run = _run_of(source)
    base |= {"storage": str((run or source).parent), "evaluate": saved["evaluate"]}
    config = Config.from_json(json.dumps(base | given)).override(**given)
    check_same_run(saved, config)
    if config.directory.exists() and any(config.directory.iterdir()):
        raise ConfigError(f"There is a run {config.directory} already. Give the new run another name.")
    return config


@contextmanager
def staged(source: Path, config: Config) -> Iterator[Config]:
    """A directory beside the new run's in which it can resume from ``source``, and end with a checkpoint of its own.

    When the block ends, the new run gets its name: as a whole, or not at all if the block raises. What a killed process
    leaves is hidden, ``STORAGE/.NAME.reshaping``, and replaced by the next attempt.

    Args:
        source: a checkpoint; it is linked, or where that cannot be, copied, and stays as it is.
        config: from :func:`reshaped_config`.

    Yields:
        The configuration of the start that loads, saves and ends.
    """
    step = read_trainer_state(source)["step"]
    hidden = config.directory.with_name(f".{config.run.name}.reshaping")
    shutil.rmtree(hidden, ignore_errors=True)
    start = config.override(storage=str(hidden), stop_after=step, evaluate=False)
    run = RunDirectory(start.directory)
    try:
        run.create()
        shutil.copytree(source, directory_of(run, step), copy_function=_link)
        old = _run_of(source)
        rows = [row for row in RunDirectory(old).rows() if row["step"] <= step] if old else []
        write_atomically(run.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))
        yield start
        write_atomically(run.config_file, config.to_json())
        os.replace(run.path, config.directory)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _run_of(checkpoint: Path) -> Path | None:
    """The directory of the run that a checkpoint lies in, if it has not been copied out of it."""
    directory = checkpoint.resolve().parent
    return directory.parent if directory.name == "checkpoints" else None


def _link(source: str, target: str) -> None:
    # A checkpoint's files are never written to again. They are removed and replaced, which leaves other links alone.
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
