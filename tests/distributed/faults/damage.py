"""Ways to damage the checkpoints of a run that has ended."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import cases


def cut_short(run: Path) -> None:
    saved = cases.checkpoint_of(run, cases.END) / "rank-001.pt"
    saved.write_bytes(saved.read_bytes()[:-1])


def flip_a_bit(run: Path) -> None:
    cases.flip_a_bit(cases.shard(run, cases.END, rank=1))


def remove_a_file(run: Path) -> None:
    cases.shard(run, cases.END, rank=1).unlink()


def remove_two_manifests(run: Path) -> None:
    for step in (cases.END, cases.END - 2):
        (cases.checkpoint_of(run, step) / "manifest.json").unlink()


WAYS = (cut_short, flip_a_bit, remove_a_file, remove_two_manifests)
