"""Runs on a file system that fills up, and on one that turns read-only.

Start ``python -m tests.distributed.faults.small_storage DIRECTORY`` in a separate mount namespace (:data:`NAMESPACE`),
where root, and on most systems any user, may mount file systems. Nothing outside sees the mounts, and they end with the
process. The runs are copied to ``DIRECTORY/runs``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.distributed.cases import crashing
from tests.distributed.observing.probe import OBSERVATION, Probe, ProbedRun, observe
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint.directory import newest_intact
from tutorial_lib.records import RunDirectory

NAMESPACE = ["unshare", "--mount", "--map-root-user"]
NO_SPACE, READ_ONLY = "disk_full", "storage.read_only"
"""Names of the two runs."""


def main(directory: Path) -> None:
    storage = directory / "runs"
    small = directory / "small"
    small.mkdir()
    no_space = ProbedRun(crashing.saving(directory, "zero1", NO_SPACE, storage=str(small)))
    fault = Probe(fault="storage.read_only")
    read_only = ProbedRun(crashing.saving(directory, "zero1", READ_ONLY, storage=str(small)), fault)
    # Room for one checkpoint and the observation, but not for a second checkpoint as well.
    room = checkpoint_bytes(storage) * 3 // 2 + (storage / "uninterrupted-saving.zero1" / OBSERVATION).stat().st_size
    mount("-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(small))
    report = {"disk_full": failure_of(no_space)}
    mount("-o", f"remount,size={checkpoint_bytes(storage) * 30}", str(small))
    report["read_only"] = failure_of(read_only)
    subprocess.run(["umount", str(small / READ_ONLY / "checkpoints")], check=True)
    observe([no_space, read_only])
    for run in (no_space, read_only):
        shutil.copytree(run.config.directory, storage / run.config.run.name)
    (directory / "small_storage.json").write_text(json.dumps(report))


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def checkpoint_bytes(storage: Path) -> int:
    """Return the size of an existing checkpoint of the same model and engine."""
    newest = checkpoint.latest(RunDirectory(storage / "uninterrupted-saving.zero1"))
    assert newest
    return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def failure_of(run: ProbedRun) -> dict[str, Any]:
    """Start a run that must fail, and return its error and the newest intact checkpoint that it leaves."""
    try:
        observe([run])
    except launch.WorkerError as error:
        found, left_out = newest_intact(RunDirectory(run.config.directory))
        return {"error": str(error), "newest": found and found.name, "left_out": len(left_out)}
    raise AssertionError(f"{run.config.run.name} ended without an error")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
