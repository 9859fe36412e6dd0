"""On-disk formats: readers that return full tensors, one at a time, from the files of any engine.

Each engine cuts a parameter, its fp32 master copy and both of Adam's moments in its own way. All of them start from the
same full tensors, with the names, shapes and order of the Hugging Face model. So a checkpoint is converted to another
shape through its full tensors, one parameter at a time, and an export does the same without the moments. The modules
:mod:`~tutorial_lib.checkpoint.formats.single`, :mod:`~tutorial_lib.checkpoint.formats.dcp`,
:mod:`~tutorial_lib.checkpoint.formats.deepspeed` and :mod:`~tutorial_lib.checkpoint.formats.trainer` describe where the
pieces are.

Files are memory-mapped or read in parts: memory holds about one parameter at a time, whatever the model's size.
DeepSpeed's own converter (``ds_to_universal``) writes everything to files first; the tests compare with its results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tutorial_lib.checkpoint.formats import dcp, deepspeed, single, trainer
from tutorial_lib.checkpoint.formats.base import MOMENTS, FullTensors
from tutorial_lib.checkpoint.manifest import read_trainer_state, verify
from tutorial_lib.config import Config, EngineConfig, ParallelConfig
from tutorial_lib.models import freeze_parameters

__all__ = ["MOMENTS", "FullTensors", "open_full", "rank_and_contents"]


def open_full(path: Path, *, verified: bool = False) -> FullTensors:
    """Open a checkpoint to read its full tensors.

    The files are pickles, so every byte is verified before any of them is opened.

    Args:
        path: a checkpoint's directory, ``step-NNNNNNNN``.
        verified: whether the caller has just verified it.

    Raises:
        CheckpointError: the checkpoint is damaged, or its files do not match the model configuration next to them.
    """
    if not verified:
        verify(path)
    settings = Config.from_json(json.dumps(read_trainer_state(path)["config"]))
    model = _meta_model(path, settings.model.freeze)
    of_engine: dict[str, Callable[[Path, EngineConfig, ParallelConfig, Any], FullTensors]] = {
        "torch": single.Single,
        "fsdp": dcp.DCP,
        "deepspeed": deepspeed.STAGES[settings.engine.zero_stage],
        "trainer": trainer.reader,
    }
    reader = of_engine[settings.engine.name](path / "engine", settings.engine, settings.parallel, model)
    reader.check_names()
    return reader


def rank_and_contents(name: str, tp: int, zero_stage: int) -> tuple[int, str] | None:
    """Return the rank that wrote an engine's file, and the file's contents, or None if no engine wrote it.

    Args:
        name: the file's name within the checkpoint.
        tp: tensor-parallel size of the run that wrote it.
        zero_stage: ZeRO stage of that run.
    """
    return (
        trainer.rank_and_contents(name, zero_stage)
        or single.rank_and_contents(name)
        or dcp.rank_and_contents(name)
        or deepspeed.rank_and_contents(name, tp, zero_stage)
    )


def _meta_model(path: Path, freeze: tuple[str, ...]) -> Any:
    """Build the checkpoint's model without values, for its names, shapes, ties and frozen parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path / "model"), dtype=torch.float32)
    model.tie_weights()
    freeze_parameters(model, freeze)
    return model
