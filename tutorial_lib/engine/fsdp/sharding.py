"""Who holds which part of a model, and when it is gathered: the four strategies, by FSDP1's names, on FSDP2.

============== ================================================== ==========================================
strategy       between steps a rank holds                         gathered parameters live
============== ================================================== ==========================================
full_shard     1/N of parameters, gradients, optimizer states     while their layer computes
shard_grad_op  the same                                           from forward until the end of backward
hybrid_shard   1/S of them, each shard on N/S ranks               while their layer computes
no_shard       all of them (plain data parallel)                  always
============== ================================================== ==========================================

N is the data-parallel size, S the ``shard_size``. Elements that cross the wire per micro-batch of Psi parameters:
``full_shard`` all-gathers Psi twice and reduce-scatters Psi (3 Psi); ``shard_grad_op`` gathers once (2 Psi);
``hybrid_shard`` does what ``full_shard`` does within S ranks, and all-reduces the Psi/S that remain among N/S ranks;
``no_shard`` all-reduces Psi (2 Psi).

``no_shard`` is :class:`torch.nn.parallel.DistributedDataParallel`, not FSDP2's own ``replicate``: it shares no code
with the other three, so that it can be a reference for them.

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate

from tutorial_lib.config import EngineConfig
from tutorial_lib.mpu import Topology, device_mesh


def meshes(engine: EngineConfig, topology: Topology, device_type: str) -> tuple[DeviceMesh, DeviceMesh]:
    """The mesh that data-parallel states are sharded over, and the tensor-parallel mesh. Collective.

    The first has the axis ``dp``; for ``hybrid_shard`` the axes ``replicate`` and ``shard``.
    """
    if engine.sharding != "hybrid_shard":
        mesh = device_mesh(topology, device_type)
        return mesh["dp"], mesh["tp"]
    assert engine.shard_size is not None
    sizes = (topology.dp // engine.shard_size, engine.shard_size, topology.tp)
    mesh = _hybrid_mesh(dist.group.WORLD, device_type, sizes)
    return mesh["replicate", "shard"], mesh["tp"]


@functools.cache
def _hybrid_mesh(world: object, device_type: str, sizes: tuple[int, int, int]) -> DeviceMesh:
    """Adjacent data-parallel ranks share one copy, so that gathers stay within a node. Once per process group."""
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard", "tp"))


def shard(model: Any, engine: EngineConfig, mesh: DeviceMesh) -> None:
    """Turn a transformers model into FSDP2 modules, in place.

    Every layer is a unit of its own, gathered by one all-gather; embeddings, the last norm and the head are the root's.
    With ``engine.wrap="root"`` the root is the only unit: the whole model is gathered at once.

    Args:
        model: on any device, the meta device included; tensor-parallel parameters are DTensors already.
        engine: decides strategy, precision, offload and units.
        mesh: with one axis (shard), or two (replicate, shard).
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        # Stated for the root, too: left to itself FSDP2 keeps the root's parameters until its backward.
        "reshard_after_forward": engine.sharding != "shard_grad_op",
        "mp_policy": _precision(engine),
        "offload_policy": CPUOffloadPolicy(pin_memory=engine.pin_memory)
        if engine.offload == "all"
        else OffloadPolicy(),
    }
    layers = layers_of(model) if engine.wrap == "layer" else []
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    _prefetch(layers)


def layers_of(model: Any) -> list[Any]:
    """Return the layers of a transformers model, in order: the modules that its authors say must stay together.

    Of modules within each other the outermost counts (Mamba names both). A module with tied weights, such as BERT's
    embeddings, is left to the root, which gathers the other end as well.
    """
    named = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    inner = {part for module in named for part in module.modules() if part is not module}
    uses = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {parameter for parameter, number in uses.items() if number > 1}
    return [module for module in named if module not in inner and tied.isdisjoint(module.parameters())]


def _precision(engine: EngineConfig) -> MixedPrecisionPolicy:
    """bf16 computes in bf16 on gathered copies; shards, gradient sums and the update stay fp32."""
    if engine.precision == "bf16":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def _prefetch(layers: list[FSDPModule]) -> None:
    """Have each layer start the all-gather of the layer that computes after it, in forward and in backward."""
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])


def data_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.parallel.DistributedDataParallel:
    """The model with an all-reduce of its gradients behind backward. Ranks must hold equal weights."""
    return nn.parallel.DistributedDataParallel(
        model,
        process_group=mesh.get_group(),
        init_sync=False,  # every rank has read or drawn the same weights
        forward_sync_buffers=False,  # they are constants
        gradient_as_bucket_view=True,  # else every gradient is held twice
    )


def release(model: nn.Module) -> None:
    """Free what is gathered. After a forward without backward, ``shard_grad_op`` would keep all of it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def copies(tensor: torch.Tensor, world_size: int) -> int:
    """How many ranks hold the same piece of a parameter or gradient as this one."""
    if not isinstance(tensor, DTensor):
        return world_size
    pieces = 1
    for axis, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            pieces *= tensor.device_mesh.size(axis)
    return world_size // pieces


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All parts of a DTensor together. Collective; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def waiting_gradients(model: nn.Module) -> list[torch.Tensor]:
    """Whole gradients of earlier micro-batches, which wait for the last one to be reduced with its own.

    FSDP2 keeps them in no public place.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    parameters = [parameter for group in groups for parameter in group.fsdp_params]
    # In fp32 they stay where autograd has put them, in bf16 an fp32 sum is made.
    found = [p.unsharded_accumulated_grad for p in parameters]
    found += [p.unsharded_param.grad for p in parameters if hasattr(p, "_unsharded_param")]
    return [local(gradient) for gradient in found if gradient is not None]
