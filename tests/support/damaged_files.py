"""Damage to the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from tutorial_lib import checkpoint
from tutorial_lib.records import RunDirectory


def cut_short(path: Path) -> None:
    """Remove the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    """Flip a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shard(run: Path, step: int, rank: int) -> Path:
    """Return the file with a rank's share of DeepSpeed's optimizer states."""
    engine = checkpoint.directory_of(RunDirectory(run), step) / "engine" / "engine"
    return next(engine.glob(f"*zero_pp_rank_{rank}_*optim_states.pt"))
