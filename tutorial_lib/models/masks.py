"""Attention masks: the same kind of batch for every model, so that no other module needs to know a model's family.

| key | padded | packed |
| --- | --- | --- |
| ``input_ids`` | [B, S] int64 | [B, S] int64 |
| ``attention_mask`` | [B, S] int64, 0 on padding | [B, 1, S, S] bool: whether query i (row) attends to key j (column) |
| ``position_ids`` | left out | [B, S] int64, starting from 0 at every document |

B is the batch size, S the sequence length. A packed mask is causal and blocked at document boundaries. Models with
PyTorch's fused attention ("sdpa": GPT-2, Qwen2 and most others) take it as it is. Two kinds of models do not, and
:func:`accept_document_masks` adapts them:

- Models with sliding-window layers (Mistral, Gemma). When transformers builds the mask itself, it cuts the mask to the
  window, but it passes a ready-made mask to every layer unchanged.
- BLOOM. Its attention *adds* the mask to the scores, and its ALiBi bias needs the distance between tokens, which BLOOM
  derives from a padding mask rather than from ``position_ids``.

Before a run starts, :mod:`tutorial_lib.engine.trial_forward` checks that its model's family accepts padded batches and,
if the run uses them, packed ones.
"""

from __future__ import annotations

import functools
import types
from typing import Any, TypeGuard

import torch
from transformers import PreTrainedModel

_SLIDING = "sliding_attention"  # transformers' name for such a layer and its mask


def accept_document_masks(model: PreTrainedModel) -> None:
    """Make a model accept a boolean [B, 1, S, S] mask that it would misread: sliding windows, added masks, ALiBi.

    Each row of a packed mask shows how many keys its token sees, itself included. That number minus one is the token's
    position within its document, so ALiBi built from these positions equals the document's ALiBi on its own. (Positions
    counted over the full row would give the same attention, because softmax ignores a constant per document, but with
    rounding errors that grow with the row.)
    """
    inner: Any = model.base_model
    if window_of(model) is not None:
        inner.register_forward_pre_hook(_cut_to_window, with_kwargs=True)
    if model.config._attn_implementation != "sdpa":
        inner.register_forward_pre_hook(_boolean_mask_to_bias, with_kwargs=True)
        if hasattr(inner, "build_alibi_tensor"):
            inner.build_alibi_tensor = types.MethodType(_build_alibi, inner)


def slice_alibi(model: PreTrainedModel, tp: int, tp_rank: int) -> None:
    """Make a model with ALiBi use the biases of one tensor-parallel rank's heads; leave other models alone.

    A head's slope depends on its index among all heads. A model that only knows its own share of the heads would
    silently use a smaller model's slopes, the same ones on every rank.

    Args:
        model: from :func:`load_model`; its attention layers may have been split already.
        tp: tensor-parallel size.
        tp_rank: the rank whose share of the heads the model has.
    """
    inner: Any = model.base_model
    if hasattr(inner, "build_alibi_tensor"):
        heads = int(model.config.num_attention_heads)
        inner.num_heads = heads
        build = functools.partial(_build_alibi, inner)

        def build_share(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
            all_heads = build(attention_mask, num_heads, dtype).unflatten(0, (-1, heads))
            return all_heads.tensor_split(tp, dim=1)[tp_rank].flatten(0, 1)

        inner.build_alibi_tensor = build_share


def window_of(model: PreTrainedModel) -> int | None:
    """Return the number of keys that a model's sliding-window layers see, or None if it has no such layers."""
    text: Any = model.config.get_text_config()
    types = getattr(text, "layer_types", None)
    return getattr(text, "sliding_window", None) if types is None or _SLIDING in types else None


def _cut_to_window(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give sliding-window layers their own mask: transformers would pass a ready-made one to every layer."""
    mask, window = kwargs.get("attention_mask"), window_of(module)
    if mask is not None and _is_document_mask(mask) and window is not None:
        windowed = mask & mask.new_ones(mask.shape[-2:]).triu(1 - window)
        has_types = getattr(module.config.get_text_config(), "layer_types", None) is not None
        kwargs["attention_mask"] = {"full_attention": mask, _SLIDING: windowed} if has_types else windowed
    return args, kwargs


def _boolean_mask_to_bias(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def bias(mask: Any) -> Any:
        if not _is_document_mask(mask):
            return mask
        zeros = torch.zeros(mask.shape, dtype=module.dtype, device=mask.device)
        return zeros.masked_fill_(~mask, torch.finfo(module.dtype).min)

    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        kwargs["attention_mask"] = {kind: bias(each) for kind, each in mask.items()}
    elif mask is not None:
        kwargs["attention_mask"] = bias(mask)
    return args, kwargs


def _is_document_mask(mask: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.dtype == torch.bool


def _build_alibi(self: Any, attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Build BLOOM's biases from a padding mask [B, S], or from the positions in a document mask [B, 1, S, S]."""
    build = functools.partial(type(self).build_alibi_tensor, self, num_heads=num_heads, dtype=dtype)
    if attention_mask.dim() != 4:
        return build(attention_mask)
    batch_size, _, _, length = attention_mask.shape
    positions_BS = (attention_mask[:, 0] == 0).sum(-1).sub(1).clamp(min=0)
    # For an unpadded row of the same length the builder gives slope * 0, 1, 2, ...: a lookup table for positions.
    table_HS = build(attention_mask.new_ones(1, length, dtype=torch.int64))[:, 0]
    return table_HS[:, positions_BS].transpose(0, 1).reshape(batch_size * num_heads, 1, length)
