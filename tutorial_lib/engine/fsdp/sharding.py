"""Sharding strategies, under FSDP1's four names: what each rank holds, and when parameters are gathered.

============== ================================================== ==========================================
strategy       after backward a rank holds                        gathered parameters live
============== ================================================== ==========================================
full_shard     1/N of parameters, gradients, optimizer states     while their layer computes
shard_grad_op  the same                                           from forward until the end of backward
hybrid_shard   1/S of them, each shard on N/S ranks               while their layer computes
no_shard       all of them (plain data parallel)                  always
============== ================================================== ==========================================

N is the data-parallel size, S the ``shard_size``. Elements on the wire per micro-batch, with Psi parameters, if every
micro-batch reduces its gradients (by default only the last one of a step does):
``full_shard`` all-gathers Psi twice and reduce-scatters Psi (3 Psi); ``shard_grad_op`` gathers once (2 Psi);
``hybrid_shard`` works like ``full_shard`` within S ranks, then all-reduces the resulting Psi/S over N/S ranks;
``no_shard`` all-reduces Psi (2 Psi).

``no_shard`` is :class:`torch.nn.parallel.DistributedDataParallel`, not FSDP2's own ``replicate``: it shares no code
with the other three, and so can serve as their reference.

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
    """Return the mesh that data-parallel states are sharded over, and the tensor-parallel mesh. Collective.

    The first has the axis ``dp`` or, for ``hybrid_shard``, the axes ``replicate`` and ``shard``.
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
    """Build the mesh of ``hybrid_shard``, once per process group.

    Adjacent data-parallel ranks share a copy, so that gathers stay within a node.
    """
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard", "tp"))


def shard_model(model: Any, engine: EngineConfig, mesh: DeviceMesh) -> None:
    """Turn a transformers model into FSDP2 modules, in place.

    Every layer is a unit, gathered by one all-gather; embeddings, the last norm and the head belong to the root. With
    ``engine.wrap="root"`` the root is the only unit: the full model is gathered at once.

    Args:
        model: a model on any device, including meta. Its tensor-parallel parameters are already DTensors.
        engine: settings for the strategy, precision, offload and units.
        mesh: a mesh with one axis (shard) or two (replicate, shard).
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        # Set for the root, too: by default FSDP2 keeps the root's parameters until its backward.
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
    """Return the layers of a transformers model, in order: the modules that its authors say must not be split.

    Of nested modules, only the outermost counts (Mamba names both). A module with tied weights, such as BERT's
    embeddings, is left to the root, which also gathers the other end of the tie.
    """
    named = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    inner = {part for module in named for part in module.modules() if part is not module}
    uses = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {parameter for parameter, number in uses.items() if number > 1}
    return [module for module in named if module not in inner and tied.isdisjoint(module.parameters())]


def _precision(engine: EngineConfig) -> MixedPrecisionPolicy:
    """Return FSDP2's precision: bf16 computes on gathered copies; shards, gradient sums and the update stay fp32."""
    if engine.precision == "bf16":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def _prefetch(layers: list[FSDPModule]) -> None:
    """Make each layer start the all-gather of the layer that computes next, in forward and in backward."""
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])


def data_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.parallel.DistributedDataParallel:
    """Wrap a model in DDP, which all-reduces its gradients after backward. Ranks must hold equal weights."""
    return nn.parallel.DistributedDataParallel(
        model,
        process_group=mesh.get_group(),
        init_sync=False,  # every rank has read or drawn the same weights
        forward_sync_buffers=False,  # they are constants
        gradient_as_bucket_view=True,  # otherwise every gradient is held twice
    )


def free_gathered_parameters(model: nn.Module) -> None:
    """Free gathered parameters. After a forward without backward, ``shard_grad_op`` would keep all of them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def num_copies(tensor: torch.Tensor, world_size: int) -> int:
    """Count the ranks that hold the same piece of a parameter or gradient as this one."""
    if not isinstance(tensor, DTensor):
        return world_size
    pieces = 1
    for axis, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            pieces *= tensor.device_mesh.size(axis)
    return world_size // pieces


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, or any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unreduced_gradients(model: nn.Module) -> list[torch.Tensor]:
    """Return the full gradients of earlier micro-batches, which will be reduced together with the last one's.

    FSDP2 has no public attribute for them.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    parameters = [parameter for group in groups for parameter in group.fsdp_params]
    # In fp32 they stay where autograd put them; in bf16 they are summed in fp32.
    found = [p.unsharded_accumulated_grad for p in parameters]
    found += [p.unsharded_param.grad for p in parameters if hasattr(p, "_unsharded_param")]
    return [local_part(gradient) for gradient in found if gradient is not None]
