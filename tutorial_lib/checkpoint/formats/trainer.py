"""Checkpoints of the Hugging Face Trainer: its own directory ``checkpoint-N``, written by its own code.

Without DeepSpeed, every tensor is stored in full: ``model.safetensors``, and ``optimizer.pt`` in the order of the
trained parameters. With DeepSpeed, the shards are in ``global_stepN``, in DeepSpeed's own format. The Trainer adds its
own files: ``trainer_state.json``, ``scheduler.pt`` and each rank's ``rng_state_R.pth``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from tutorial_lib.checkpoint.formats import deepspeed
from tutorial_lib.checkpoint.formats.base import OPTIMIZER, WEIGHT, WEIGHTS, FullTensors
from tutorial_lib.checkpoint.formats.single import Single
from tutorial_lib.checkpoint.manifest import CheckpointError
from tutorial_lib.config import EngineConfig, ParallelConfig

DIRECTORY, _SHARDS = "checkpoint-*", "global_step*"
"""Patterns of the directories that the Trainer and DeepSpeed write."""


def reader(directory: Path, engine: EngineConfig, parallel: ParallelConfig, model: Any) -> FullTensors:
    """Return the reader for a checkpoint: the one for DeepSpeed's shards if the run had a DeepSpeed file.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    written = written_by_trainer(directory)
    if engine.deepspeed_file is None:
        return FullFiles(written, engine, parallel, model)
    (shards,) = written.glob(_SHARDS)
    return deepspeed.STAGES[engine.zero_stage](written, engine, parallel, model, shards.name)


def written_by_trainer(directory: Path) -> Path:
    """Return the Trainer's own directory within a checkpoint, for ``resume_from_checkpoint``.

    Raises:
        CheckpointError: there is none, or several.
    """
    found = sorted(directory.glob(DIRECTORY))
    if len(found) != 1:
        raise CheckpointError(f"{directory} holds {len(found)} directories of the Hugging Face Trainer instead of one.")
    return found[0]


class FullFiles(Single):
    """Reader for tensors that one process wrote in full, with the weights in one or several files."""

    def __init__(self, directory: Path, engine: EngineConfig, parallel: ParallelConfig, model: Any) -> None:
        super().__init__(directory, engine, parallel, model)
        self._second_names = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {*self.names}

    def _stored_names(self) -> Iterable[str]:
        # If a model was sharded at load, transformers writes tied parameters under each of their names.
        return self._file_of.keys() - self._second_names

    def _read(self, name: str, kind: str) -> Tensor:
        tensor: Tensor
        if kind == WEIGHT:
            with safe_open(self._file_of[name], "pt") as file:
                tensor = file.get_tensor(name)
        else:
            tensor = self._state(name)[kind]
        return tensor

    def buffers(self) -> dict[str, Tensor]:
        return {name: self._read(name, WEIGHT) for name in self._buffer_names if name in self._file_of}

    @functools.cached_property
    def _file_of(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(self._directory.glob("model*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found


def rank_and_contents(name: str, zero_stage: int) -> tuple[int, str] | None:
    """Return the rank that wrote a file of this format, and the file's contents, or None for any other file."""
    found = re.match(r"engine/checkpoint-\d+/(.*)", name)
    if not found:
        return None
    file = found[1]
    if random := re.fullmatch(r"rng_state_?(\d*)\.pth", file):
        return int(random[1] or 0), "random states"
    if shard := deepspeed.rank_and_contents(name, 1, zero_stage):
        return shard
    if file == "optimizer.pt":
        return 0, OPTIMIZER
    return 0, WEIGHTS if file.endswith(".safetensors") else "the Trainer's record"
