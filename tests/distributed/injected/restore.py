"""Deliberate faults in a resume: states that are not restored, or restored wrongly in a different shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from tutorial_lib import checkpoint
from tutorial_lib.dataloader.sampler import StepSampler


@contextmanager
def random_states_not_restored() -> Iterator[None]:
    with mock.patch.object(checkpoint.loader, "restore_random_states", lambda states, device: None):
        yield


@contextmanager
def position_not_restored() -> Iterator[None]:
    with mock.patch.object(StepSampler, "load_state_dict", lambda self, state: None):
        yield


@contextmanager
def optimizer_not_restored() -> Iterator[None]:
    """Restore the weights but not the moments, as from a checkpoint that has only weights."""
    from tutorial_lib.engine.deepspeed.engine import DeepSpeedEngine

    def load(self: Any, directory: Path) -> None:
        self.deepspeed.load_checkpoint(str(directory), tag="engine", load_optimizer_states=False)

    with mock.patch.object(DeepSpeedEngine, "load", load):
        yield


@contextmanager
def updates_not_counted() -> Iterator[None]:
    """Restart Adam's bias correction after three updates."""
    with mock.patch.object(checkpoint.formats.deepspeed.Stage3, "adam_step", lambda self, name: 0):
        yield


@contextmanager
def columns_left_by_rank() -> Iterator[None]:
    """Leave GPT-2's fused columns in the order of the ranks that saved them."""
    with mock.patch.object(checkpoint.formats.dcp, "by_part", lambda tensor, tp: tensor):
        yield


@contextmanager
def moments_exchanged() -> Iterator[None]:
    moment = checkpoint.FullTensors.moment
    other = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}

    def exchanged(self: Any, name: str, which: str) -> Tensor:
        return moment(self, name, other[which]).abs()  # Adam takes the root of the second moment

    with mock.patch.object(checkpoint.FullTensors, "moment", exchanged):
        yield
