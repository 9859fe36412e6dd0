"""A checkpoint's files: a manifest that makes them whole or nothing, and the check of them before any is opened."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import all_gather_objects, broadcast_object
from tutorial_lib.records import RunDirectory

MANIFEST = "manifest.json"

FORMAT = 2
"""Written into ``trainer.json`` and the manifest. 2: with the fingerprints of model and tokenizer. 1 is still read."""

_NAME = re.compile(r"step-\d{8}")
_PARTIAL, _DELETING = ".partial-", ".deleting-"
_REMAINS = re.compile(r"\.(partial|deleting)-(?P<final>step-\d{8})(-[0-9a-f]{8})?")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another run. The message names the file and the next step."""


class NewerFormat(CheckpointError):
    """A checkpoint that a newer version has written: it may be whole, so nothing is put in its place."""


class Unreadable(CheckpointError):
    """A file that the storage did not give now: what lies there may be whole."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A checkpoint that a resume has passed over.

    Attributes:
        checkpoint: its directory's name.
        why: what is wrong with it, with the file's name.
    """

    checkpoint: str
    why: str


def directory_of(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def checkpoints(run: RunDirectory) -> list[Path]:
    """All directories that are named as a checkpoint, whole or not, the oldest first."""
    return sorted(path for path in run.checkpoints.glob("step-*") if _NAME.fullmatch(path.name))


def latest(run: RunDirectory) -> Path | None:
    """The newest checkpoint that looks whole, or ``None`` for a run that has saved nothing.

    Cheap: the files are there in their sizes, and ``trainer.json`` is what was written. :func:`newest_whole` reads all.

    Raises:
        CheckpointError: there are checkpoints, and none of them looks whole; or the newest is of a newer format.
    """
    return _newest(run, checkpoints(run), damage_at_a_glance)[0]


def newest_whole(run: RunDirectory, topology: Topology | None = None) -> tuple[Path | None, list[LeftOut]]:
    """The newest checkpoint whose every byte is as written, and what was left out before it was found.

    With a topology this is collective: the ranks share the reading, and all return the same.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole; or the newest is of a newer format.
    """
    # One rank lists: on a network file system others may still see an older listing.
    found = broadcast_object(checkpoints(run)) if topology else checkpoints(run)
    return _newest(run, found, lambda path: damage(path, topology))


def _newest(
    run: RunDirectory, found: list[Path], damage_of: Callable[[Path], CheckpointError | None]
) -> tuple[Path | None, list[LeftOut]]:
    left_out: list[LeftOut] = []
    for path in reversed(found):
        why = damage_of(path)
        if why is None:
            return path, left_out
        if isinstance(why, NewerFormat):
            raise why
        left_out.append(LeftOut(path.name, str(why)))
    if left_out:
        raise CheckpointError(
            f"Run {run.path.name!r} has checkpoints, and none of them is whole: "
            + " ".join(each.why for each in left_out)
            + f" Restore the files of one of them, or remove {run.checkpoints} to begin again from step 0."
        )
    return None, []


def read_trainer_state(path: Path) -> dict[str, Any]:
    """What ``trainer.json`` of a checkpoint holds.

    Raises:
        CheckpointError: not there, or of a format that this version does not know.
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
    """Compare every file with the manifest. With a topology the work is shared out, and all ranks learn the outcome.

    Raises:
        CheckpointError: names the first missing or altered file.
    """
    if found := damage(path, topology):
        if isinstance(found, NewerFormat):
            raise found
        raise CheckpointError(f"{found} Nothing was loaded. Restore its files, or take another checkpoint.")


def damage(path: Path, topology: Topology | None = None) -> CheckpointError | None:
    """What is wrong with a checkpoint, with the first missing or altered file's name; ``None`` if it is whole.

    :class:`NewerFormat` and :class:`Unreadable` say that it may be whole, and that nobody can tell here and now. With a
    topology this is collective, and every rank reads a share of the files.
    """
    rank, size = (topology.rank, topology.world_size) if topology else (0, 1)
    files, problem = _manifest_or_error(path) if rank == 0 else ({}, None)
    if size > 1:
        # One rank reads the manifest: if each did, one that cannot would leave the others waiting for it.
        files, problem = broadcast_object((files, problem))
    if problem:
        return problem
    found = next(filter(None, (file_damage(path / n, files[n]) for n in sorted(files)[rank::size])), None)
    if size > 1:
        found = next(filter(None, all_gather_objects(found)), None)
    return found


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a checkpoint, by its name within it.

    Raises:
        CheckpointError: there is no manifest, or it is not one.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        _check_format(path, manifest["format"])
        files = {name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no {MANIFEST}: it was not written to its end, or a file was removed."
        ) from None
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


def damage_at_a_glance(path: Path) -> CheckpointError | None:
    """As :func:`damage`, for what shows without reading more than the manifest and ``trainer.json``."""
    files, problem = _manifest_or_error(path)
    if problem:
        return problem
    wrong = next(filter(None, (wrong_size(path / name, entry) for name, entry in files.items())), None)
    return wrong or file_damage(path / "trainer.json", files["trainer.json"])


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


def wrong_size(path: Path, entry: dict[str, Any]) -> CheckpointError | None:
    """What a file's size tells of its damage; ``None`` if it is as listed."""
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
    """What is wrong with a file of a checkpoint, which the manifest describes so; ``None`` if nothing is."""
    if wrong := wrong_size(path, entry):
        return wrong
    try:
        if digest(path)["sha256"] != entry["sha256"]:
            return CheckpointError(f"{path} was altered after it was written (its SHA-256 differs).")
    except OSError as error:
        return _unreadable(path, error)
    return None


def _unreadable(path: Path, error: OSError) -> Unreadable:
    return Unreadable(f"{path} cannot be read: {error.strerror}.")


def clear_remains(run: RunDirectory) -> None:
    """Remove what saves and deletions of killed starts have left behind under names that nobody reads."""
    for path, final in _remains(run):
        if _lacks_only_its_name(path, final):
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def next_start_from(run: RunDirectory) -> str | None:
    """The name of what :func:`latest` finds when the next start has cleared the remains of this one."""
    unnamed = [final.name for path, final in _remains(run) if _lacks_only_its_name(path, final)]
    newest = latest(run)
    return max([*unnamed, *([newest.name] if newest else [])], default=None)


def _remains(run: RunDirectory) -> list[tuple[Path, Path]]:
    found = [(path, _REMAINS.fullmatch(path.name)) for path in run.checkpoints.iterdir()]
    return [(path, path.with_name(match["final"])) for path, match in found if match]


def _lacks_only_its_name(path: Path, final: Path) -> bool:
    """It is complete: its save was killed just before :func:`publish`, or between its renames."""
    return path.name.startswith(_PARTIAL) and (path / MANIFEST).is_file() and not final.exists()


def partial_of(final: Path) -> Path:
    """A new name under which a checkpoint is written, and which nobody reads.

    No two saves have the same: a rank that outlives its start may still be writing into the one that it knows.
    """
    return final.with_name(f"{_PARTIAL}{final.name}-{secrets.token_hex(4)}")


def publish(partial: Path, final: Path) -> None:
    """Give a checkpoint that is complete its name; one that has it is replaced and then deleted."""
    doomed = _doomed(final)
    if final.exists():
        os.rename(final, doomed)
    os.rename(partial, final)
    sync(final.parent)
    if doomed.exists():
        _discard(doomed)


def delete(path: Path) -> None:
    """Delete a checkpoint. A reader sees all of it or nothing: it loses its name first, at once.

    Raises:
        ValueError: the path is not named as a checkpoint.
    """
    if not _NAME.fullmatch(path.name):
        raise ValueError(f"{path} is not named as a checkpoint")
    doomed = _doomed(path)
    os.rename(path, doomed)
    sync(path.parent)
    _discard(doomed)


def _doomed(final: Path) -> Path:
    return final.with_name(f"{_DELETING}{final.name}-{secrets.token_hex(4)}")


_deletions: list[threading.Thread] = []


def _discard(doomed: Path) -> None:
    """Delete the files of what has lost its name, in the background: freeing their room can take a while."""
    thread = threading.Thread(target=shutil.rmtree, args=(doomed, True), name="checkpoint-deletion")
    try:
        thread.start()  # what cannot be removed now, the next start tries again
    except RuntimeError:  # this system has no more threads
        thread.run()
    else:
        _deletions.append(thread)


def finish_deletions() -> None:
    """Return when the files of all that was deleted are gone, or cannot be removed now."""
    while _deletions:
        _deletions.pop().join()
