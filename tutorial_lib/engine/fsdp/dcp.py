"""Checkpoints with ``torch.distributed.checkpoint`` (DCP): every rank writes its shards into its own file.

DCP records in ``.metadata`` where each part of each tensor is, so that a different number of processes, or a different
sharding, can read the checkpoint: each rank finds the parts that it needs in any rank's file. If several ranks hold the
same part, one of them writes it.

Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from tutorial_lib.checkpoint import MOMENTS, CheckpointError, FullTensors
from tutorial_lib.checkpoint.formats.dcp import Reader
from tutorial_lib.checkpoint.rank_writer import Writer
from tutorial_lib.engine.fsdp.weights import copy_slices
from tutorial_lib.models.stored import persistent_buffers


def save(
    directory: Path,
    writer: Writer,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write parameters, persistent buffers and AdamW's states. Collective.

    This does the work of ``dcp.async_save``, but on the writer's thread instead of a new one.

    Args:
        directory: directory to write into.
        writer: the rank's writer, which decides when to write.
        model: the model that holds the parameters and buffers.
        optimizer: the optimizer that holds their moments.
        group: process group in which ranks agree on what each writes. If the writer has a thread, nothing else may use
            this group.
    """
    writer.submit(_save, writer.snapshot(_states(model, optimizer)), writer.sharded(directory), group)


def _save(states: dict[str, Any], storage: dcp.FileSystemWriter, group: dist.ProcessGroup | None) -> None:
    try:
        dcp.save(states, storage_writer=storage, process_group=group)
    except CheckpointException as error:
        # DCP reports a failure to every rank. The rank that failed raises its own error, and the others notice at their
        # next collective.
        own = error.failures.get(dist.get_rank())
        if own is not None:
            raise own[0] from error


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the states that :func:`save` wrote, in place. Collective. ``.metadata`` is a pickle: verify it first.

    Checkpoints of older versions hold no buffers. The model's buffers then keep the values from its files or, if no
    file holds them, from its code.

    Raises:
        CheckpointError: there is nothing to load.
    """
    if not (directory / ".metadata").is_file():
        raise CheckpointError(
            f"FSDP found nothing to load in {directory}: it has no .metadata. The run was not resumed."
        )
    states, reader = _states(model, optimizer), Reader(directory)
    if not any(name.startswith("buffers.") for name in reader.read_metadata().state_dict_metadata):
        states.pop("buffers", None)
    dcp.load(states, storage_reader=reader)
    for step, (_, parameter) in zip(states["step"], _trained(model), strict=True):
        optimizer.state[parameter]["step"].copy_(step)
    for group in optimizer.param_groups:
        group["lr"] = float(states["learning_rate"])


@torch.no_grad()
def load_full(full: FullTensors, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Restore states that any engine saved, in any shape, in place: each rank takes its slices of every full tensor."""
    states, model_type = _states(model, optimizer), model.config.model_type
    full.restore_buffers(model)
    for name, parameter in states["parameters"].items():
        copy_slices(parameter, name, model_type, full.parameter(name).__getitem__)
    for name, parameter in _trained(model):
        for moment in MOMENTS:
            copy_slices(states[moment][name], name, model_type, full.moment(name, moment).__getitem__)
        optimizer.state[parameter]["step"].fill_(full.adam_step(name))


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Collect all tensors by name, not by number: the order in a parameter group depends on how the model is split."""
    trained = list(_trained(model))
    for _, parameter in trained:
        if not optimizer.state[parameter]:
            # Allocate what AdamW would allocate in its first step.
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            optimizer.state[parameter].update({"step": torch.zeros((), device=parameter.device), **moments})
    buffers = persistent_buffers(model)
    return {
        "parameters": dict(model.named_parameters()),
        **({"buffers": buffers} if buffers else {}),
        **{moment: {name: optimizer.state[p][moment] for name, p in trained} for moment in MOMENTS},
        "step": torch.stack([optimizer.state[parameter]["step"] for _, parameter in trained]).cpu(),
        "learning_rate": torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64),
    }


def _trained(model: nn.Module) -> Any:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
