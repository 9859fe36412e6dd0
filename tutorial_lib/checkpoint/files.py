"""A checkpoint's files: a manifest that makes them whole or nothing, and the check of them before any is opened."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory

T = TypeVar("T")

MANIFEST = "manifest.json"

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another run. The message names the file and the next step."""


def directory_of(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def latest(run: RunDirectory) -> Path | None:
    """The newest checkpoint that was completely written, or ``None`` for a run that has saved nothing.

    Raises:
        CheckpointError: a checkpoint directory exists but has lost its manifest.
    """
    found = sorted(run.checkpoints.glob("step-*"))
    if not found:
        return None
    if not (found[-1] / MANIFEST).is_file():
        raise CheckpointError(
            f"{found[-1]} has no {MANIFEST}: it was not written by this package, or a file was removed. "
            f"Delete that directory to go on from the checkpoint before it."
        )
    return found[-1]


def read_trainer_state(path: Path) -> dict[str, Any]:
    """What ``trainer.json`` of a checkpoint holds.

    Raises:
        CheckpointError: not there, or of a format that this version does not know.
    """
    try:
        trainer = dict(json.loads((path / "trainer.json").read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / 'trainer.json'} cannot be read: {error}. {next_step(path)}") from error
    if trainer.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {trainer.get('format')}; this version reads format {FORMAT}.")
    return trainer


def verify(path: Path, topology: Topology | None = None) -> None:
    """Compare every file with the manifest. With a topology the work is shared out, and all ranks learn the outcome.

    Raises:
        CheckpointError: names the first missing or altered file.
    """
    rank, size = (topology.rank, topology.world_size) if topology else (0, 1)
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}. {next_step(path)}") from error
    problem = next(filter(None, (_damage(path / n, files[n]) for n in sorted(files)[rank::size])), None)
    if topology and size > 1:
        problems: list[str | None] = [None] * size
        dist.all_gather_object(problems, problem)
        problem = next(filter(None, problems), None)
    if problem:
        raise CheckpointError(f"{problem} {next_step(path)}")


def sync(path: Path) -> None:
    """Have a file's content, or a directory's entries, on the disk itself before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _damage(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing from the checkpoint."
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path} has {size} bytes, but {entry['bytes']} were written."
    if digest(path)["sha256"] != entry["sha256"]:
        return f"{path} was altered after it was written (its SHA-256 differs)."
    return None


def next_step(path: Path) -> str:
    return f"Nothing was loaded. Delete {path} to go on from the checkpoint before it, or restore its files."


def agreed(value: T) -> T:
    """Rank 0's value, on every rank. Collective."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gathered(value: T, topology: Topology) -> list[T]:
    """Every rank's value, by rank. Collective."""
    if topology.world_size == 1:
        return [value]
    values: list[Any] = [None] * topology.world_size
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
