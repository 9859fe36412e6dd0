"""Checkpoints of plain PyTorch: one process writes every tensor in full."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checkpoint.formats.base import OPTIMIZER, WEIGHT, WEIGHTS, FullTensors, names_without_duplicates


class Single(FullTensors):
    def _stored_names(self) -> Iterable[str]:
        return names_without_duplicates(self._weights)

    def _read(self, name: str, kind: str) -> Tensor:
        tensor: Tensor = self._weights[name] if kind == WEIGHT else self._state(name)[kind]
        return tensor

    def adam_step(self, name: str) -> int:
        return int(self._state(name)["step"])

    def buffers(self) -> dict[str, Tensor]:
        return {name: self._weights[name] for name in self._buffer_names if name in self._weights}

    def _state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer["state"][self._number[name]]
        return state

    @functools.cached_property
    def _weights(self) -> dict[str, Tensor]:
        return dict(torch.load(self._directory / "model.pt", map_location="cpu", mmap=True, weights_only=True))

    @functools.cached_property
    def _optimizer(self) -> dict[str, Any]:
        return dict(torch.load(self._directory / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True))


def rank_and_contents(name: str) -> tuple[int, str] | None:
    """Return the rank that wrote a file of this format, and the file's contents, or None for any other file."""
    return {"engine/model.pt": (0, WEIGHTS), "engine/optimizer.pt": (0, OPTIMIZER)}.get(name)
