"""Crashing runs: a fault ends the launch, and the next start continues the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.cases.interruption import uninterrupted
from tutorial_lib.config import Config

FATAL: dict[str, tuple[str, dict[str, Any]]] = {
    "killed.in_forward": ("zero3", {}),
    "killed.in_backward": ("zero1", {}),
    "killed.in_update": ("fsdp-full", {}),
    "killed.in_save": ("zero1", {}),
    "killed.in_publish": ("zero3", {}),
    "killed.in_prune": ("zero1", {"keep_last": 1}),
    "killed.in_report": ("zero1", {}),
    "storage.save_raises": ("zero1", {}),
    "killed.in_write": ("zero1", {"async_save": True}),
    "storage.limit_in_write": ("zero1", {"async_save": True}),
}
"""Faults that end the launch, each with its kind of run and settings."""

LONG: dict[str, Any] = {"steps": 48, "model": "gpt2-dropout-slow"}
"""Settings of a run that lasts long enough to be interrupted from outside at any step."""


def saving(directory: Path, kind: str, name: str, **changes: Any) -> Config:
    """Return the configuration of a run that saves a checkpoint at every second step."""
    return uninterrupted(directory, kind, **{"name": name, "checkpoint_every": 2, **changes})
