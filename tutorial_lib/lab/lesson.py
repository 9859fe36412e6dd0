"""Start of a lesson: its storage, cleared of earlier runs and reserved for one reader, its GPUs, and its texts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.files import lock_holder, write_lock_holder

if TYPE_CHECKING:
    from datasets import Dataset

_LESSON = ".lesson"
_READER = ".reader.lock"
_held: dict[Path, FileLock] = {}

VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
"""The GPUs that this process was given; None if all."""


def set_visible_gpus(profile: str) -> None:
    """Hide the GPUs from processes that this one starts, if the lesson's profile trains on CPUs; else show them.

    A script that chooses its device itself would otherwise train on a GPU of this machine, in bf16, and its ranks would
    need a GPU each.

    Args:
        profile: the lesson's ``PROFILE``.
    """
    visible = "" if Config.create(profile).run.device == "cpu" else VISIBLE_GPUS
    if visible is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


def texts_of(rows: Dataset) -> Sequence[str]:
    """Return the texts of a lesson's data set.

    Args:
        rows: rows of one split.

    Raises:
        ConfigError: they have no column named ``text``; the message says what to write instead.
    """
    if "text" not in rows.column_names:
        raise ConfigError(
            f"This data set has the columns {', '.join(rows.column_names)}, and the lesson reads texts from a column "
            "named text. Write a DATASET that has one, such as 'embedded/news'."
        )
    return rows["text"]


def remove_runs(storage: str, *names: str) -> None:
    """Remove the runs directly under a lesson's own storage directory, so that none is resumed. Other files stay.

    From then on the directory belongs to this process until it ends: a second kernel that opens the same lesson gets an
    error, instead of removing the runs that the first one is about to use. A directory that is new or empty becomes the
    lesson's own, and gets a marker file.

    Args:
        storage: the lesson's ``STORAGE``.
        *names: only these directories in it, with whatever a cell wrote there, so that the cell can run again.

    Raises:
        ConfigError: the directory was not made by a lesson, another process uses it, or a run in it is still running.
            Nothing is removed.
    """
    directory = Path(storage)
    marker = directory / _LESSON
    if not marker.is_file():
        if directory.exists() and any(directory.iterdir()):
            raise ConfigError(
                f"{directory} was not made by a lesson, so its runs may still be needed: none was removed. Write the "
                f"name of a new directory, such as STORAGE = {str(directory / 'lesson')!r}. If all runs in it may be "
                f"deleted, create the empty file {marker} first."
            )
        directory.mkdir(parents=True, exist_ok=True)
        marker.write_text("The lesson that uses this directory removes the runs in it when it begins.\n")
    _reserve(directory)
    # A reader's own training loop leaves a lock next to its checkpoints, but no config.json.
    runs = [
        path.parent
        for path in directory.glob("*/checkpoints")
        if path.is_dir() and ((path.parent / "config.json").exists() or (path.parent / ".lock").exists())
    ]
    if names:
        runs = [directory / name for name in names if (directory / name).is_dir()]
    if running := sorted(run.name for run in runs if _is_running(run)):
        raise ConfigError(
            f"{directory} cannot be emptied: {', '.join(running)} is still running in it. Wait until it ends, stop it, "
            "or write another STORAGE."
        )
    for run in runs:
        shutil.rmtree(run)


def _reserve(directory: Path) -> None:
    """Keep other processes out of the directory until this one ends, when the operating system releases the lock."""
    path = directory.resolve() / _READER
    if path in _held:
        return
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{directory} is in use by {lock_holder(path)}, which has this lesson open and keeps its runs there. Shut "
            f"that notebook's kernel down, or write another STORAGE here, such as {str(directory) + '-2'!r}."
        ) from None
    except OSError:
        return  # a file system without locks: two readers would not notice each other
    write_lock_holder(path)
    _held[path] = lock


def _is_running(run: Path) -> bool:
    """Return whether a process holds a lock of the run (tutorial_lib.checkpoint.lock) to launch or train it."""
    for name in (".launch.lock", ".lock"):
        if not (run / name).exists():
            continue
        try:
            with FileLock(run / name, timeout=0, fallback_to_soft=False):
                pass
        except Timeout:
            return True
        except OSError:
            continue  # this file system has no locks, so no run holds one
    return False
