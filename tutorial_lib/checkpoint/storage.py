"""Storage checks: refuse unusable storage before processes start, and tell a later storage failure from a bug."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from tutorial_lib.checkpoint.manifest import CheckpointError
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.records import RunDirectory


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


_FULL_OR_CLOSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

_TORCH_COULD_NOT_WRITE = ("inline_container", "iostream error", "PytorchStreamWriter")

_PROBE_BYTES = 2**20


def storage_failure(run: RunDirectory, error: BaseException) -> CheckpointError | None:
    """Return a clear error if the run's storage caused this one, or None. PyTorch reports a full disk as a bug."""
    if isinstance(error, OSError) and error.errno in _FULL_OR_CLOSED:
        # An error elsewhere, such as in a data set or a cache, has nothing to do with the run's storage.
        is_here = _is_under(error.filename, run.path)
        reason = f"{error.strerror}: {error.filename}" if is_here else write_failure(run.path)
    elif isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_COULD_NOT_WRITE):
        reason = write_failure(run.path) or str(error).splitlines()[0]
    else:
        reason = None
    if reason is None:
        return None
    return CheckpointError(
        f"The storage of run {run.path.name!r} cannot be written to ({reason}; "
        f"{shutil.disk_usage(run.path).free / 2**20:.0f} MiB are free there). Earlier checkpoints are untouched. "
        "Make room or make it writable, then run the same command again: it resumes from the newest intact "
        "checkpoint. Set keep_last to delete older ones during the run."
    )


def _is_under(name: Any, directory: Path) -> bool:
    """Return whether an error's ``filename``, which may be a descriptor or None, is within a directory."""
    if not isinstance(name, str | bytes | os.PathLike):
        return False
    return Path(os.fsdecode(name)).resolve().is_relative_to(directory.resolve())


def write_failure(directory: Path) -> str | None:
    """Return why a small file cannot be written to a directory right now, or None if it can."""
    probe = directory / f".write-test-{os.getpid()}"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        return error.strerror
    finally:
        with suppress(OSError):
            probe.unlink()
    return None
