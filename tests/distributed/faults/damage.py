"""Ways to damage the checkpoints of a run that has ended."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.cases.interruption import END
from tests.support import damaged_files
from tests.support.damaged_files import shard
from tutorial_lib import checkpoint
from tutorial_lib.records import RunDirectory


def cut_short(run: Path) -> None:
    damaged_files.cut_short(checkpoint.directory_of(RunDirectory(run), END) / "rank-001.pt")


def flip_a_bit(run: Path) -> None:
    damaged_files.flip_a_bit(shard(run, END, rank=1))


def remove_a_file(run: Path) -> None:
    shard(run, END, rank=1).unlink()


def remove_two_manifests(run: Path) -> None:
    for step in (END, END - 2):
        (checkpoint.directory_of(RunDirectory(run), step) / "manifest.json").unlink()


WAYS = (cut_short, flip_a_bit, remove_a_file, remove_two_manifests)
