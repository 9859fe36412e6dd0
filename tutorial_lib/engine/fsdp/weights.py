"""Initial weights of a model that no rank ever holds in full: each rank fills its own shards.

The model is built on the meta device, where tensors have shapes but no memory. It is split and sharded there, and only
then gets memory, for this rank's shards alone. Every rank reads its own slices of pretrained values from safetensors
files. Random values are drawn in full, as in a single process, one layer or tensor at a time, and everything but this
rank's slice is dropped. Drawing everything on every rank costs time, but neither memory nor communication, and the
result equals the plain model bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tutorial_lib.config import ConfigError, ModelConfig
from tutorial_lib.engine.fsdp.sharding import layers_of, local_part
from tutorial_lib.models.fused_qkv import by_rank, is_fused_by_part
from tutorial_lib.models.meta import drawing_weights, locate_tensors
from tutorial_lib.models.stored import persistent_buffers

Slices = tuple[slice, ...]

_UNSET = math.nan
"""Value of every floating-point number until something sets it."""


def fill_model(model: Any, m: ModelConfig, *, seed: int, device: torch.device, host: bool) -> None:
    """Allocate a model that is on the meta device, and fill in the values that its configuration asks for.

    Args:
        model: from :func:`tutorial_lib.models.meta.model_outline`, already split and sharded.
        m: names the model, and says whether its weights are read or drawn.
        seed: seed for the weights that are drawn.
        device: where the model computes.
        host: keep the parameters in host memory instead.

    Raises:
        ConfigError: the files lack a parameter, or hold it in a different shape; or the model's code gives a value only
            while it builds a module.
    """
    model.to_empty(device="cpu" if host else device)
    # to_empty gives each of two tied parameters a tensor of its own.
    model.tie_weights()
    _compute_buffers(model, device)
    parameters: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(parameter, []).append(name)
    with torch.no_grad():
        if m.random_init:
            _draw(parameters, m, seed, model.config.model_type)
        else:
            _read(parameters, persistent_buffers(model), m, model.config.model_type)
    for name, buffer in model.named_buffers():
        _check_set(buffer, name, model.config.model_type)


def slices(parameter: Tensor) -> Slices:
    """Return the slices of the full parameter that this rank holds.

    Tensor-parallel pieces are sharded further, so the mesh's last axis cuts first. Pieces are cut as
    ``torch.chunk`` cuts them: the last one may be shorter, or empty.
    """
    bounds = [(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis in reversed(range(mesh.ndim)):
            dim = getattr(parameter.placements[axis], "dim", None)
            if dim is not None:
                first, last = bounds[dim]
                size = -(-(last - first) // mesh.size(axis))
                start = min(first + mesh.get_local_rank(axis) * size, last)
                bounds[dim] = (start, min(start + size, last))
    return tuple(slice(*bound) for bound in bounds)


def copy_slices(parameter: Tensor, name: str, model_type: str, read: Callable[[Slices], Tensor]) -> None:
    """Copy this rank's slices of a tensor into a parameter; ``read`` returns any slices of it."""
    mine, tp = slices(parameter), tensor_parallel_size(parameter)
    if tp > 1 and is_fused_by_part(name, model_type):
        # All columns are needed, because they are reordered before they are cut.
        part = by_rank(read((*mine[:-1], slice(None))), tp)[..., mine[-1]]
    else:
        part = read(mine)
    local_part(parameter).copy_(part)


def tensor_parallel_size(parameter: Tensor) -> int:
    """Return the number of tensor-parallel ranks that a parameter is split over."""
    if not isinstance(parameter, DTensor) or "tp" not in (parameter.device_mesh.mesh_dim_names or ()):
        return 1
    return parameter.device_mesh["tp"].size()


def _read(parameters: dict[Tensor, list[str]], buffers: dict[str, Tensor], m: ModelConfig, model_type: str) -> None:
    """Fill parameters from the model's files, and those buffers that the files hold."""
    stored = locate_tensors(m)
    with ExitStack() as stack:
        paths = sorted({tensor.path for tensor in stored.values()})
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
        for parameter, names in parameters.items():
            # Tied weights are stored under at least one of their names.
            tensor = next(stored[name] for name in names if name in stored)
            copy_slices(parameter, names[0], model_type, opened[tensor.path].get_slice(tensor.name).__getitem__)
        for name in buffers.keys() & stored.keys():
            tensor = stored[name]
            buffers[name].copy_(opened[tensor.path].get_tensor(tensor.name))


def _draw(parameters: dict[Tensor, list[str]], m: ModelConfig, seed: int, model_type: str) -> None:
    """Fill parameters with the values that :func:`tutorial_lib.models.load_model` draws."""
    # While weights are drawn, tied ones are still separate, and transformers keeps the numbers of the first one.
    own = {names[0]: parameter for parameter, names in parameters.items()}
    with drawing_weights(m, seed) as source:
        for prefix, unit in _initialized(source):
            for name, drawn in unit.named_parameters(prefix=prefix):
                if name in own and not drawn.is_meta:
                    _check_set(drawn, name, model_type)
                    copy_slices(own[name], name, model_type, drawn.__getitem__)


def _initialized(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model on the meta device, children first; each has values until the next one is requested.

    A layer counts as one module, because its parts may set each other's weights, as in GPT-2.
    """
    layers = set(layers_of(model))

    def visit(prefix: str, module: nn.Module, owner: Any) -> Iterator[tuple[str, nn.Module]]:
        owner = module if isinstance(module, PreTrainedModel) else owner
        if module not in layers:
            for name, child in module.named_children():
                yield from visit(f"{prefix}.{name}" if prefix else name, child, owner)
        module.to_empty(device="cpu", recurse=module in layers)
        for parameter in module.parameters(recurse=module in layers):
            parameter.fill_(_UNSET)
        if module in layers:
            module.apply(owner._initialize_weights)
        else:
            owner._initialize_weights(module)
        yield prefix, module
        module.to_empty(device="meta", recurse=module in layers)

    yield from visit("", model, model)


def _check_set(tensor: Tensor, name: str, model_type: str) -> None:
    if tensor.isnan().any():
        raise ConfigError(
            f"engine='fsdp' cannot give {name} its value, which the code of {model_type} models sets only while it "
            "builds them. Write engine='deepspeed' or 'torch'."
        )


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give all buffers the values that the model's code computes, such as the frequencies of rotary embeddings."""
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                empty = torch.empty_like(buffer, device=device)
                setattr(module, name, empty.fill_(_UNSET) if empty.is_floating_point() else empty)
            model._init_weights(module)
