"""Weights of a finished run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tutorial_lib import checkpoint
from tutorial_lib.records import RunDirectory


def trained_weights(run: RunDirectory, scratch: Path) -> dict[str, torch.Tensor]:
    """Return the parameters in a run's newest checkpoint, by name.

    Args:
        run: the run.
        scratch: a directory to export to.
    """
    newest = checkpoint.latest(run)
    assert newest is not None
    return load_file(checkpoint.export(newest, scratch / run.path.name) / "model.safetensors")
