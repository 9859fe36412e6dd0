"""Whole weights, by their Hugging Face names, out of the files that each engine's ranks have written."""

from __future__ import annotations

import json
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from tutorial_lib import autotp
from tutorial_lib.config import Config
from tutorial_lib.fused import by_part, is_fused_by_part
from tutorial_lib.models import freeze_parameters

LAYOUT = "layout.json"
"""Among the files of an engine that splits parameters over tensor-parallel ranks: how each of them was split."""


def whole_weights(directory: Path, settings: Config, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    if settings.engine.name == "torch":
        return dict(torch.load(directory / "model.pt", map_location="cpu", weights_only=True))
    if settings.engine.name == "fsdp":
        return _whole_weights_of_fsdp(directory, settings.parallel.tp, model)
    freeze_parameters(model, settings.model.freeze)
    if settings.parallel.tp == 1:
        return _merged_over_dp(directory, settings, model)
    rows = json.loads((directory / LAYOUT).read_text(encoding="utf-8"))
    if settings.engine.zero_stage == 3:
        return autotp.merged_stage_3(directory, rows, settings.parallel.dp, settings.parallel.tp)
    shares = []
    for tp_rank in range(settings.parallel.tp):
        with autotp.as_if_alone(directory, tp_rank) as alone:
            shares.append(_merged_over_dp(alone, settings, model))
    return autotp.joined(shares, rows)


def _merged_over_dp(directory: Path, settings: Config, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    frozen = [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]
    weights: dict[str, torch.Tensor] = {}
    if settings.engine.zero_stage > 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it prints what it does, and a bar per loop
            weights = dict(get_fp32_state_dict_from_zero_checkpoint(str(directory), tag="engine"))
    if settings.engine.zero_stage == 3:
        return weights
    # Verified above; DeepSpeed's own file holds more than tensors.
    state = torch.load(directory / "engine" / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    if settings.engine.zero_stage > 0:
        # What is not trained is in no shard of the optimizer, and at stage 1 DeepSpeed's merge leaves it out.
        return weights | {name: state["module"][name].float() for name in frozen if name not in weights}
    weights = {name: tensor.float() for name, tensor in state["module"].items()}
    if settings.engine.precision != "fp32":
        # Without ZeRO, DeepSpeed keeps the masters without names, in the order of the trained parameters.
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        masters = [master.detach() for group in state["optimizer"]["fp32_groups"] for master in group]
        weights.update(zip(trained, masters, strict=True))
    return weights


def _whole_weights_of_fsdp(directory: Path, tp: int, model: Any) -> dict[str, torch.Tensor]:
    # DCP reads its metadata, a pickle, and finds the parts of every tensor in it: verified above.
    weights = {name: torch.empty(parameter.shape) for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*load in a single process")  # that is the intent
        dcp.load({"parameters": weights}, checkpoint_id=str(directory), no_dist=True)
    return {
        name: by_part(tensor, tp).contiguous() if is_fused_by_part(name, model.config.model_type) else tensor
        for name, tensor in weights.items()
    }
