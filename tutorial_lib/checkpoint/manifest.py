"""Checkpoint manifest: every file with its size and SHA-256, written last and compared before anything is opened."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import all_gather_objects, broadcast_object

MANIFEST = "manifest.json"

FORMAT = 2
"""Format number in ``trainer.json`` and the manifest. Format 1, which recorded no identity, is still read."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or cannot be written. The message names the path, and often says what to do."""


class NewerFormat(CheckpointError):
    """A newer version wrote this checkpoint. It may be intact, so it is never replaced."""


class Unreadable(CheckpointError):
    """A file cannot be read right now. It may be intact."""


def read_trainer_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's ``trainer.json``.

    Raises:
        CheckpointError: it is missing, or in a format that this version does not know.
    """
    try:
        trainer = dict(json.loads((path / "trainer.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'trainer.json'} cannot be read: {error}.") from error
    _check_format(path, trainer.get("format"))
    return trainer


def _check_format(path: Path, number: Any) -> None:
    if isinstance(number, int) and number > FORMAT:
        raise NewerFormat(
            f"{path} was written by a newer version, in format {number}; this version reads formats 1 to {FORMAT}. "
            "Update tutorial_lib to the version that wrote it, or give this run another name."
        )
    if not isinstance(number, int) or number < 1:
        raise CheckpointError(f"{path} has format {number!r}; this version reads formats 1 to {FORMAT}.")


def verify(path: Path, topology: Topology | None = None) -> None:
    """Compare every file with the manifest. With a topology, the ranks share the work, and all learn the result.

    Raises:
        CheckpointError: names the first missing or altered file.
    """
    if found := damage(path, topology):
        if isinstance(found, NewerFormat):
            raise found
        raise CheckpointError(f"{found} Nothing was loaded. Restore its files, or use another checkpoint.")


def damage(path: Path, topology: Topology | None = None) -> CheckpointError | None:
    """Return a checkpoint's damage, naming the first missing or altered file, or ``None`` if it is intact.

    :class:`NewerFormat` and :class:`Unreadable` mean that it may be intact, but cannot be checked right now. With a
    topology this is collective, and every rank reads a share of the files.
    """
    rank, size = (topology.rank, topology.world_size) if topology else (0, 1)
    files, problem = _manifest_or_error(path) if rank == 0 else ({}, None)
    if size > 1:
        # Only rank 0 reads the manifest: if every rank did, one that failed would leave the others waiting.
        files, problem = broadcast_object((files, problem))
    if problem:
        return problem
    found = next(filter(None, (file_damage(path / n, files[n]) for n in sorted(files)[rank::size])), None)
    if size > 1:
        found = next(filter(None, all_gather_objects(found)), None)
    return found


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of every file of a checkpoint, by its name within the checkpoint.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        _check_format(path, manifest["format"])
        files = {name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: the save did not finish, or a file was removed.") from None
    except OSError as error:
        raise _unreadable(path / MANIFEST, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {type(error).__name__}: {error}.") from error
    if "trainer.json" not in files:
        raise CheckpointError(f"{path / MANIFEST} does not list trainer.json, which every checkpoint has.")
    return files


def _manifest_or_error(path: Path) -> tuple[dict[str, dict[str, Any]], CheckpointError | None]:
    try:
        return read_manifest(path), None
    except CheckpointError as error:
        return {}, error


def damage_by_size(path: Path) -> CheckpointError | None:
    """Return a checkpoint's damage as :func:`damage` does, but judging only by file sizes and ``trainer.json``."""
    files, problem = _manifest_or_error(path)
    if problem:
        return problem
    wrong = next(filter(None, (wrong_size(path / name, entry) for name, entry in files.items())), None)
    return wrong or file_damage(path / "trainer.json", files["trainer.json"])


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_entry(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def wrong_size(path: Path, entry: dict[str, Any]) -> CheckpointError | None:
    """Return why a file's size is wrong, or ``None`` if it matches the manifest."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return CheckpointError(f"{path} is missing from the checkpoint.")
    except OSError as error:
        return _unreadable(path, error)
    if size != entry["bytes"]:
        return CheckpointError(f"{path} has {size} bytes, but {entry['bytes']} were written.")
    return None


def file_damage(path: Path, entry: dict[str, Any]) -> CheckpointError | None:
    """Return a file's damage, or ``None`` if it matches its entry in the manifest."""
    if wrong := wrong_size(path, entry):
        return wrong
    try:
        if file_entry(path)["sha256"] != entry["sha256"]:
            return CheckpointError(f"{path} was altered after it was written (its SHA-256 differs).")
    except OSError as error:
        return _unreadable(path, error)
    return None


def _unreadable(path: Path, error: OSError) -> Unreadable:
    return Unreadable(f"{path} cannot be read: {error.strerror}.")
