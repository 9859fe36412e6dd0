"""DTensor tensor parallelism for GPT-2, Qwen2 and BLOOM: layers split by columns and by rows.

Attention and MLP each consist of a column-parallel product, an element-wise or per-head operation, and a row-parallel
product (Megatron-LM, arXiv:1909.08053)::

    x  --column-->  heads / t  --row-->  a sum over the tensor-parallel ranks

In forward, each row-parallel product ends in one all-reduce: 2 per layer. In backward, the gradient of ``x`` is a sum
over the ranks, too. If ``x`` becomes a DTensor once, on entering attention or the MLP (``PrepareModuleInput``), each
block needs one all-reduce: 2 per layer. In the plan ``plain``, every column-parallel product takes ``x`` by itself and
all-reduces its own gradient: Qwen2 has five of them (query, key, value, gate, up), so a layer needs 2 + 5. GPT-2 and
BLOOM have only two, because they fuse query, key and value, so both plans cost the same.

Embeddings, norms and the head are replicated on every rank. Most models of these families tie the head to the
embedding: splitting one by vocabulary means splitting both, and the loss, which the trainer computes in the same way
for every engine, would have to handle split logits. Replicated parameters see the same numbers on every
tensor-parallel rank, so their gradients are equal without any communication.

Ranks of a group draw the same dropout masks. In attention this means that heads on different ranks share masks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from transformers.pytorch_utils import Conv1D

from tutorial_lib.config import ConfigError
from tutorial_lib.engine.fsdp.sharding import layers_of, local_part
from tutorial_lib.engine.parameter_layout import ParameterLayout
from tutorial_lib.models import slice_alibi


def split_model(model: Any, mesh: DeviceMesh, plan: str = "megatron") -> None:
    """Split every layer of a model over the mesh, in place. On the meta device nothing is allocated or sent.

    Args:
        model: a model of one of the three families, whose numbers of heads are multiples of the mesh's size.
        mesh: the mesh, with the single axis ``tp``.
        plan: ``megatron`` (2 + 2 all-reduces per layer), or ``plain``; see the module's docstring.

    Raises:
        ConfigError: the model belongs to another family.
    """
    family = model.config.model_type
    if family not in FAMILIES:
        raise ConfigError(
            f"engine='fsdp' has no tensor-parallel plan for {family!r} models, only for {', '.join(FAMILIES)}. "
            "Write tp=1."
        )
    styles, localize = FAMILIES[family]
    chosen = {name: s for name, s in styles().items() if plan == "megatron" or not isinstance(s, PrepareModuleInput)}
    for layer in layers_of(model):
        parallelize_module(layer, mesh, chosen, src_data_rank=None)
    localize(model, mesh)


def parameter_layouts(model: Any) -> list[ParameterLayout]:
    """Return the layout of each parameter on the ranks of its tensor-parallel group, in the model's order.

    A fused projection of GPT-2 is listed as one parameter. Its columns are sorted by rank; a saved model has them
    sorted by part (:mod:`tutorial_lib.models.fused_qkv`).

    Args:
        model: a model that is split, and sharded by FSDP2.
    """
    found = []
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            dim, partitions = None, 1
            for axis, placement in zip(_axes(parameter), getattr(parameter, "placements", ()), strict=True):
                if isinstance(placement, Replicate):
                    continue
                if axis == "tp":
                    dim = placement.dim
                else:
                    partitions *= parameter.device_mesh.size(parameter.device_mesh.mesh_dim_names.index(axis))
            after = list(parameter.shape)
            if dim is not None:
                after[dim] //= parameter.device_mesh["tp"].size()
            held = local_part(parameter.detach())
            found.append(
                ParameterLayout(
                    parameter=name,
                    how="replicated" if dim is None else _how(module, parameter, dim),
                    dim=dim,
                    before=tuple(parameter.shape),
                    after=tuple(after),
                    partitions=partitions,
                    bytes=held.numel() * held.element_size(),
                )
            )
    unique = {row.parameter: row for row in found}
    return [unique[name] for name, _ in model.named_parameters()]


def _axes(parameter: Tensor) -> tuple[str, ...]:
    return tuple(parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else ()


def _how(module: nn.Module, parameter: Tensor, dim: int) -> str:
    # A split bias belongs to a column-parallel layer: a row-parallel layer adds its full bias once, after the sum.
    outputs = 1 if isinstance(module, Conv1D) and parameter.dim() == 2 else 0
    return "column" if dim == outputs else "row"


class _ColumnwiseConv1D(ColwiseParallel):
    """``ColwiseParallel`` for GPT-2's ``Conv1D``, a linear layer whose weight is stored as (in, out)."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _distribute(self, module, device_mesh, weight=Shard(1), bias=Shard(0), desired=(Replicate(),))


class _RowwiseConv1D(RowwiseParallel):
    """``RowwiseParallel`` for GPT-2's ``Conv1D``."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _distribute(self, module, device_mesh, weight=Shard(0), bias=Replicate(), desired=(Shard(-1),))


def _distribute(style: Any, module: nn.Module, mesh: DeviceMesh, *, weight: Any, bias: Any, desired: Any) -> nn.Module:
    assert isinstance(module, Conv1D)

    def partition(_name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, placement in (("weight", weight), ("bias", bias)):
            parameter = getattr(module, name)
            piece = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(piece, requires_grad=parameter.requires_grad))

    return distribute_module(
        module,
        mesh,
        partition,
        partial(style._prepare_input_fn, style.input_layouts, desired),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


def _input(num_others: int = 0) -> PrepareModuleInput:
    """Return a style that turns a module's first positional argument into a DTensor, and leaves the others alone."""
    layouts = (Replicate(), *[None] * num_others)
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


def _gpt2() -> dict[str, ParallelStyle]:
    return {
        "attn": _input(),
        "attn.c_attn": _ColumnwiseConv1D(),
        "attn.c_proj": _RowwiseConv1D(),
        "mlp": _input(),
        "mlp.c_fc": _ColumnwiseConv1D(),
        "mlp.c_proj": _RowwiseConv1D(),
    }


def _localize_gpt2(model: Any, mesh: DeviceMesh) -> None:
    for layer in layers_of(model):
        layer.attn.split_size //= mesh.size()
        layer.attn.num_heads //= mesh.size()


def _qwen2() -> dict[str, ParallelStyle]:
    by_keyword: dict[str, Placement] = {"hidden_states": Replicate()}
    return {
        "self_attn": PrepareModuleInput(input_kwarg_layouts=by_keyword, desired_input_kwarg_layouts=by_keyword),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp": _input(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }


def _localize_qwen2(model: Any, mesh: DeviceMesh) -> None:
    """Change nothing: Qwen2's attention infers the number of heads from the width of its projections' outputs."""


def _bloom() -> dict[str, ParallelStyle]:
    return {
        "self_attention": _input(num_others=1),
        "self_attention.query_key_value": ColwiseParallel(),
        "self_attention.dense": RowwiseParallel(),
        "mlp": _input(num_others=1),
        "mlp.dense_h_to_4h": ColwiseParallel(),
        "mlp.dense_4h_to_h": RowwiseParallel(),
    }


def _localize_bloom(model: Any, mesh: DeviceMesh) -> None:
    for layer in layers_of(model):
        layer.self_attention.num_heads //= mesh.size()
    slice_alibi(model, mesh.size(), mesh.get_local_rank())


FAMILIES: dict[str, tuple[Any, Any]] = {
    "gpt2": (_gpt2, _localize_gpt2),
    "qwen2": (_qwen2, _localize_qwen2),
    "bloom": (_bloom, _localize_bloom),
}
"""Styles of each model type that this module splits, and the function that adapts a split model to one rank."""
