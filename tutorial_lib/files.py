"""File checks that several packages share: git-lfs pointers, and the process that holds a lock file."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

_LFS_POINTER = b"version https://git-lfs"


def is_lfs_pointer(path: Path) -> bool:
    """Return whether ``git clone`` left a git-lfs pointer in place of the file."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def write_lock_holder(path: Path) -> None:
    """Write the id and host of this process, and the time, into a lock file that it has just locked."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")


def lock_holder(path: Path) -> str:
    """Return a description of the process that has locked a file, for an error message."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "a process that has not written its id yet"
