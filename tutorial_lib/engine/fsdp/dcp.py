"""Checkpoints by ``torch.distributed.checkpoint`` (DCP): every rank writes what it holds into a file of its own.

DCP keeps, in ``.metadata``, which file has which part of which tensor, so that another number of processes, or another
sharding, can read it: each rank finds the parts that it needs in the files of any ranks. What several ranks hold alike
is written by one of them.

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

from tutorial_lib.checkpoint import MOMENTS, CheckpointError, FullTensors, Writer
from tutorial_lib.engine.fsdp.weights import put


def save(
    directory: Path,
    writer: Writer,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write parameters and AdamW's states. Collective.

    What ``dcp.async_save`` does with a thread of its own, on the writer's.

    Args:
        directory: where to.
        writer: decides when.
        model: the parameters.
        optimizer: their moments.
        group: where ranks agree on who writes what; if the writer has a thread, one that nothing else uses.
    """
    writer.submit(_save, writer.snapshot(_states(model, optimizer)), writer.sharded(directory), group)


def _save(states: dict[str, Any], storage: dcp.FileSystemWriter, group: dist.ProcessGroup | None) -> None:
    try:
        dcp.save(states, storage_writer=storage, process_group=group)
    except CheckpointException as error:
        # It tells all ranks. The one that failed raises; the others meet it, or its end, when they next wait for it.
        own = error.failures.get(dist.get_rank())
        if own is not None:
            raise own[0] from error


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what :func:`save` wrote, in place. Collective. ``.metadata`` is a pickle: verify it first.

    Raises:
        CheckpointError: there is nothing to load.
    """
    if not (directory / ".metadata").is_file():
        raise CheckpointError(
            f"FSDP found nothing to load in {directory}: it has no .metadata. The run was not resumed."
        )
    states = _states(model, optimizer)
    dcp.load(states, checkpoint_id=str(directory))
    for step, (_, parameter) in zip(states["step"], _trained(model), strict=True):
        optimizer.state[parameter]["step"].copy_(step)
    for group in optimizer.param_groups:
        group["lr"] = float(states["learning_rate"])


@torch.no_grad()
def load_full(full: FullTensors, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Restore what an engine of any shape has saved, in place: each rank takes its slices of every whole tensor."""
    states, model_type = _states(model, optimizer), model.config.model_type
    for name, parameter in states["parameters"].items():
        put(parameter, name, model_type, full.parameter(name).__getitem__)
    for name, parameter in _trained(model):
        for moment in MOMENTS:
            put(states[moment][name], name, model_type, full.moment(name, moment).__getitem__)
        optimizer.state[parameter]["step"].fill_(full.adam_step(name))


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Tensors by name. Under names, not numbers: a parameter group's order depends on how the model is split."""
    trained = list(_trained(model))
    for _, parameter in trained:
        if not optimizer.state[parameter]:
            # What AdamW allocates in its first step.
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            optimizer.state[parameter].update({"step": torch.tensor(0.0), **moments})
    return {
        "parameters": dict(model.named_parameters()),
        **{moment: {name: optimizer.state[p][moment] for name, p in trained} for moment in MOMENTS},
        "step": torch.stack([optimizer.state[parameter]["step"].cpu() for _, parameter in trained]),
        "learning_rate": torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64),
    }


def _trained(model: nn.Module) -> Any:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
