"""Reshape of a checkpoint: ranks of a new shape (number of ranks, engine, ZeRO stage) load it, save it and end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tutorial_lib.checkpoint.compatibility import check_same_run
from tutorial_lib.checkpoint.directory import directory_of, use_checkpoint
from tutorial_lib.checkpoint.manifest import CheckpointError, read_trainer_state
from tutorial_lib.config import ENGINES, START_ONLY, Config, ConfigError, settings
from tutorial_lib.records import RunDirectory, write_atomically

_ENGINE_SPECIFIC = tuple(name for name, setting in settings().items() if {*ENGINES} - {"trainer"} - {*setting.engines})


def reshape(source: Path, flat: dict[str, Any], start_run: Callable[[Config], object]) -> Config:
    """Create a new run from another run's checkpoint, rewritten in a different shape. The old run is unchanged.

    Args:
        source: a run's directory (its newest intact checkpoint), or one checkpoint.
        flat: ``name`` of the new run, and settings that differ, as for :func:`reshaped_config`.
        start_run: function that starts ranks of the new shape, and waits until they have resumed the given run, saved
            it and ended.

    Returns:
        The configuration of the new run.

    Raises:
        CheckpointError: the checkpoint is damaged, or cannot be copied.
        ConfigError: the settings cannot run or would change the updates, or a run of this name exists.
    """
    with ExitStack() as staged:

        def stage(found: Path) -> tuple[Config, Config]:
            config = reshaped_config(found, flat)
            return config, staged.enter_context(_staged(found, config))

        config, start = use_checkpoint(source, stage)
        start_run(start)
    return config


def reshaped_config(source: Path, flat: dict[str, Any]) -> Config:
    """Build the configuration of the run that continues a checkpoint in a different shape.

    Args:
        source: the checkpoint.
        flat: settings that differ from the saved ones, including the new run's ``name``. Without ``storage``, the
            new run is placed next to the old one. If the engine changes, the old engine's settings return to their
            defaults; if ``zero_stage`` or ``offload`` is given, the new run does not use the old DeepSpeed file.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the settings cannot run or would change the updates, or a run of this name exists.
    """
    trainer = read_trainer_state(source)
    saved = trainer["config"]
    given = dict(flat)
    if other := sorted(given.keys() & START_ONLY):
        raise ConfigError(
            f"A reshape trains no steps, so {', '.join(other)} cannot be set here, only in the training run."
        )
    if "name" not in given:
        raise ConfigError("A reshape creates a new run: write its name.")
    if given.setdefault("launcher", "local") == "none":
        raise ConfigError(
            "A reshape starts its own processes: write launcher='local' or 'ray'. Under torchrun or srun you need no "
            "reshape: just continue the run in the new shape."
        )
    engines = {saved["engine"], given.get("engine", saved["engine"])}
    if "trainer" in engines:
        raise ConfigError(
            "The Hugging Face Trainer reads and writes checkpoints of its own, which cannot be reshaped. Export the "
            f"weights instead: `python -m tutorial_lib export {source} DIR`, then train with model='DIR'."
        )
    defaults = {name: setting.default for name, setting in settings().items()}
    reset: tuple[str, ...] = ()
    if len(engines) > 1:
        reset = _ENGINE_SPECIFIC
    elif given.keys() & {"zero_stage", "offload"}:
        reset = ("deepspeed",)
    elif "sharding" in given:
        reset = ("shard_size", "reduce_each") if given["sharding"] == "no_shard" else ("shard_size",)
    base = saved | {name: defaults[name] for name in (*reset, *START_ONLY)}
    run = _run_of(source)
    base |= {"storage": str((run or source).parent), "evaluate": saved["evaluate"]}
    config = Config.from_json(json.dumps(base | given)).override(**given)
    # An error names the old run, from which its weights can be exported.
    old = {"storage": str(run.parent), "name": run.name} if run else {}
    check_same_run(trainer, config.replaced(**old), None)
    if config.directory.exists() and any(config.directory.iterdir()):
        raise ConfigError(f"There is already a run {config.directory}. Give the new run another name.")
    return config


@contextmanager
def _staged(source: Path, config: Config) -> Iterator[Config]:
    """Create a temporary directory in which the new run resumes from ``source`` and saves its own checkpoint.

    When the block ends, the complete run gets its final name; if the block raises, there is no new run. Anything left
    by a failure (logs) or a kill is hidden in ``STORAGE/.NAME.reshaping``, and replaced by the next attempt.

    Args:
        source: a checkpoint. It is hard-linked or, if that is impossible, copied, and does not change.
        config: from :func:`reshaped_config`.

    Yields:
        The configuration of the start that loads, saves and ends.
    """
    step = read_trainer_state(source)["step"]
    hidden = config.directory.with_name(f".{config.run.name}.reshaping")
    shutil.rmtree(hidden, ignore_errors=True)
    start = config.override(storage=str(hidden), stop_after=step, evaluate=False)
    run, complete = RunDirectory(start.directory), False
    try:
        run.create()
        try:
            shutil.copytree(source, directory_of(run, step), copy_function=_link)
        except shutil.Error as error:  # it lists every file; the first reason is enough
            raise CheckpointError(f"{source} cannot be copied: {error.args[0][0][2]}. There is no new run.") from error
        old = _run_of(source)
        rows = [row for row in RunDirectory(old).rows() if row["step"] <= step] if old else []
        write_atomically(run.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))
        yield start
        write_atomically(run.config_file, config.to_json())
        os.replace(run.path, config.directory)
        complete = True
    finally:
        has_logs = not complete and run.logs.is_dir() and any(run.logs.iterdir())  # the error may name one of them
        shutil.rmtree(run.checkpoints if has_logs else hidden, ignore_errors=True)


def _run_of(checkpoint: Path) -> Path | None:
    """Return the directory of the run that a checkpoint is in, or None if the checkpoint was copied elsewhere."""
    directory = checkpoint.resolve().parent
    return directory.parent if directory.name == "checkpoints" else None


def _link(source: str, target: str) -> None:
    # A checkpoint's files are never modified, only removed and replaced, which does not affect other hard links.
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
