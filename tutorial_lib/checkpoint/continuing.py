"""May this run go on from that checkpoint? Answered from its settings, before any process starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tutorial_lib.checkpoint.files import read_trainer_state
from tutorial_lib.config import FREE_ON_RESUME, Config, ConfigError

_SHAPE = {
    "torch": (),
    "fsdp": ("sharding", "shard_size", "offload"),
    "deepspeed": ("zero_stage", "offload", "deepspeed"),
}


def shape(flat: dict[str, Any]) -> dict[str, Any]:
    """The settings, by their flat names, that decide which rank holds what of a run's state, and saves it how."""
    return {name: flat[name] for name in ("engine", "device", "dp", "tp", *_SHAPE[flat["engine"]])}


def check_same_run(saved: dict[str, Any], config: Config) -> None:
    """Refuse to continue a run under settings that would make other updates of it.

    The number of ranks, the engine, the ZeRO stage and all else that decides where the state lies may change.

    Raises:
        ConfigError: names every setting that differs, and both values.
    """
    now = json.loads(json.dumps(config.flat()))
    free = set(FREE_ON_RESUME)
    if config.optimizer.schedule == "constant":
        free |= {"steps", "epochs"}
    differing = [
        f"{name} was {saved.get(name)!r}, now {now[name]!r}"
        for name in now
        if name not in free and saved.get(name) != now[name]
    ]
    if differing:
        raise ConfigError(
            f"Run {config.run.name!r} cannot go on with other settings: {'; '.join(differing)}. "
            "Write the old values, or give the new run another name."
        )


def check_continues(config: Config, found: Path) -> None:
    """Refuse to continue a run from a checkpoint that it must not, or cannot, continue.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: its settings are others, or ``resume='never'`` forbids to touch it.
    """
    if config.run.resume == "never":
        raise ConfigError(
            f"Run {config.run.name!r} has the checkpoint {found}, and resume='never' forbids to continue it. "
            "Choose another name, or write resume='auto'."
        )
    check_same_run(read_trainer_state(found)["config"], config)


def check_storage(config: Config) -> None:
    """Refuse storage that cannot be written to, before any process starts.

    Raises:
        ConfigError: names the directory and the reason.
    """
    directory = config.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"storage {config.run.storage!r} cannot be written to: {error.strerror}. "
            "Name a directory that every rank can write to."
        ) from error
