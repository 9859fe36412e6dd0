"""Runs on a file system that fills up, and on one that turns read-only: ``python -m ... small_storage DIRECTORY``.

Start it in a separate mount namespace (:data:`NAMESPACE`), where root and, on most systems, everybody may
mount: nothing outside sees the mounts, and they are gone with the process. What the runs leave is copied to
``DIRECTORY/runs``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.distributed import cases
from tests.distributed.launching import observe
from tests.distributed.worker import OBSERVATION
from tutorial_lib import checkpoint, launch
from tutorial_lib.config import Config
from tutorial_lib.records import RunDirectory

NAMESPACE = ["unshare", "--mount", "--map-root-user"]
RUNS = ("disk_full", "broken-read_only")


def main(directory: Path) -> None:
    storage = directory / "runs"
    small = directory / "small"
    small.mkdir()
    full, closed = (cases.fault(directory, "zero1", name=name, storage=str(small)) for name in RUNS)
    # One checkpoint and what the tests observe fit, two checkpoints do not.
    room = checkpoint_bytes(storage) * 3 // 2 + (storage / "sound-zero1" / OBSERVATION).stat().st_size
    mount("-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(small))
    report = {"disk_full": failure_of(full)}
    mount("-o", f"remount,size={checkpoint_bytes(storage) * 30}", str(small))
    report["read_only"] = failure_of(closed)
    subprocess.run(["umount", str(small / closed.run.name / "checkpoints")], check=True)
    observe([full, closed])
    for config in (full, closed):
        shutil.copytree(config.directory, storage / config.run.name)
    (directory / "small_storage.json").write_text(json.dumps(report))


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def checkpoint_bytes(storage: Path) -> int:
    """Return the size of an existing checkpoint of the same model and engine."""
    newest = checkpoint.latest(RunDirectory(storage / "sound-zero1"))
    assert newest
    return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def failure_of(config: Config) -> dict[str, Any]:
    try:
        observe([config])
    except launch.WorkerError as error:
        found, left_out = checkpoint.newest_intact(RunDirectory(config.directory))
        return {"error": str(error), "newest": found and found.name, "left_out": len(left_out)}
    raise AssertionError(f"{config.run.name} ended as if nothing were wrong")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
