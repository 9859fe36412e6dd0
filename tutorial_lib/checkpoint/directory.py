"""Checkpoint directories: their names, the newest one, and renames that publish a checkpoint entirely or not at all."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tutorial_lib.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    NewerFormat,
    damage,
    damage_by_size,
    sync,
)
from tutorial_lib.config import ConfigError
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import broadcast_object
from tutorial_lib.records import RunDirectory

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 3
"""Number of checkpoints to try if a run deletes them while they are read."""

_NAME = re.compile(r"step-\d{8}")
_PARTIAL, _DELETING = ".partial-", ".deleting-"
_LEFTOVER = re.compile(r"\.(partial|deleting)-(?P<final>step-\d{8})(-[0-9a-f]{8})?")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A damaged checkpoint that a resume skipped.

    Attributes:
        checkpoint: name of its directory.
        why: description of the problem, which names the damaged file.
    """

    checkpoint: str
    why: str


def directory_of(run: RunDirectory, step: int) -> Path:
    """Return the directory of a run's checkpoint at a step, even if it does not exist."""
    return run.checkpoints / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, from its directory's name."""
    return int(path.name.removeprefix("step-"))


def is_named_like_a_checkpoint(path: Path) -> bool:
    """Return whether a directory has the name under which a run saves a checkpoint."""
    return _NAME.fullmatch(path.name) is not None


def checkpoints(run: RunDirectory) -> list[Path]:
    """Return all directories named like a checkpoint, intact or not, oldest first."""
    return sorted(path for path in run.checkpoints.glob("step-*") if is_named_like_a_checkpoint(path))


def latest(run: RunDirectory) -> Path | None:
    """Return the newest checkpoint that looks intact, or ``None`` if the run has saved nothing.

    This is cheap: it compares file sizes and reads ``trainer.json``. :func:`newest_intact` reads every byte.

    Raises:
        CheckpointError: there are checkpoints, but none looks intact; or the newest has a newer format.
    """
    return _newest_of_all(run, damage_by_size)[0]


def newest_intact(run: RunDirectory, topology: Topology | None = None) -> tuple[Path | None, list[LeftOut]]:
    """Return the newest checkpoint that is intact in every byte, and the newer ones that were skipped.

    With a topology this is collective: the ranks share the reading, and all return the same result.

    Raises:
        CheckpointError: there are checkpoints, but none is intact; or the newest has a newer format.
    """
    if topology is None:
        return _newest_of_all(run, damage)
    # All ranks use rank 0's listing: on a network file system, others may still see an older one.
    return _newest(run, broadcast_object(checkpoints(run)), lambda path: damage(path, topology))


def locate(source: Path) -> Path:
    """Find the checkpoint at a path: the directory itself or, for a run's directory, its newest intact checkpoint.

    A warning names newer checkpoints that are damaged.

    Raises:
        CheckpointError: the run has checkpoints, but none is intact.
        ConfigError: there is no checkpoint.
    """
    source = source.expanduser()
    if (source / MANIFEST).is_file():
        return source
    found, left_out = newest_intact(RunDirectory(source))
    for each in left_out:
        _LOG.warning("left out %s: %s", each.checkpoint, each.why)
    if found is None:
        raise ConfigError(f"{source} is neither a checkpoint nor the directory of a run that has one.")
    return found


def use_checkpoint(source: Path, use: Callable[[Path], T]) -> T:
    """Call a function with the checkpoint at a path, which :func:`locate` finds, and return its result.

    A run that is training may delete the checkpoint meanwhile. Then call the function again with a newer one.

    Raises:
        CheckpointError: every checkpoint was deleted too soon; or as for :func:`locate`.
        ConfigError: there is no checkpoint.
    """
    for _ in range(ATTEMPTS):
        found = locate(source)
        try:
            return use(found)
        except (CheckpointError, OSError):
            if found.exists():
                raise
            _LOG.warning("%s was deleted while it was read, because its run is training.", found)
    raise _deleted_too_soon(found.parent.parent)


def _deleted_too_soon(run: Path) -> CheckpointError:
    return CheckpointError(
        f"Run {run.name!r} is training, and deleted {ATTEMPTS} checkpoints while they were read. Wait until it "
        "ends, or stop it and continue it with a larger keep_last."
    )


def _newest_of_all(
    run: RunDirectory, damage_of: Callable[[Path], CheckpointError | None]
) -> tuple[Path | None, list[LeftOut]]:
    """Return the newest intact checkpoint of a run that may be training, and so delete some while they are read."""
    for _ in range(ATTEMPTS):
        found = checkpoints(run)
        try:
            return _newest(run, found, damage_of)
        except CheckpointError:
            if all(path.exists() for path in found):
                raise
    raise _deleted_too_soon(run.path)


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
            f"Run {run.path.name!r} has checkpoints, but none of them is intact: "
            + " ".join(each.why for each in left_out)
            + f" Restore the files of one of them, or remove {run.checkpoints} to start over from step 0."
        )
    return None, []


def clean_up_leftovers(run: RunDirectory) -> None:
    """Publish the complete saves that killed starts left behind, and delete everything else that they left."""
    for path, final in _leftovers(run):
        if _is_complete(path, final):
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def next_start_from(run: RunDirectory) -> str | None:
    """Return the name of the checkpoint that the next start will find, once it has cleaned up after this one."""
    unnamed = [final.name for path, final in _leftovers(run) if _is_complete(path, final)]
    newest = latest(run)
    return max([*unnamed, *([newest.name] if newest else [])], default=None)


def _leftovers(run: RunDirectory) -> list[tuple[Path, Path]]:
    found = [(path, _LEFTOVER.fullmatch(path.name)) for path in run.checkpoints.glob(".*")]
    return [(path, path.with_name(match["final"])) for path, match in found if match]


def _is_complete(path: Path, final: Path) -> bool:
    """Return whether a checkpoint is complete, but has no final name because its save was killed too early."""
    return path.name.startswith(_PARTIAL) and (path / MANIFEST).is_file() and not final.exists()


def partial_of(final: Path) -> Path:
    """Return a new temporary name for a checkpoint while it is written.

    Two saves never share a name, because a rank that outlives its start may still be writing under the old one.
    """
    return final.with_name(f"{_PARTIAL}{final.name}-{secrets.token_hex(4)}")


def publish(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its final name. An older checkpoint of that name is replaced, then deleted."""
    deleting = _deleting_of(final)
    if final.exists():
        os.rename(final, deleting)
    os.rename(partial, final)
    sync(final.parent)
    if deleting.exists():
        _discard(deleting)


def delete(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so a reader sees either all of it or nothing.

    Raises:
        ValueError: the path is not named like a checkpoint.
    """
    if not is_named_like_a_checkpoint(path):
        raise ValueError(f"{path} is not named like a checkpoint")
    deleting = _deleting_of(path)
    os.rename(path, deleting)
    sync(path.parent)
    _discard(deleting)


def _deleting_of(final: Path) -> Path:
    return final.with_name(f"{_DELETING}{final.name}-{secrets.token_hex(4)}")


_deletions: list[threading.Thread] = []


def _discard(deleting: Path) -> None:
    """Delete a renamed directory in the background: freeing its space can take a while."""
    thread = threading.Thread(target=shutil.rmtree, args=(deleting, True), name="checkpoint-deletion")
    try:
        thread.start()  # the next start removes anything left
    except RuntimeError:  # the system has no threads left
        thread.run()
    else:
        _deletions.append(thread)


def finish_deletions() -> None:
    """Wait until all background deletions have ended."""
    while _deletions:
        _deletions.pop().join()
