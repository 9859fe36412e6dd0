"""Masks: one kind of batch for every model, so that nothing after this page asks for a model's family.

| key | padded | packed |
| --- | --- | --- |
| ``input_ids`` | [B, S] int64 | [B, S] int64 |
| ``attention_mask`` | [B, S] int64, 0 on padding | [B, 1, S, S] bool: may query i (row) look at key j (column)? |
| ``position_ids`` | left out | [B, S] int64, from 0 again at every document |

B is the batch size, S the sequence length. A packed mask is causal and blocked at document borders. Models with
PyTorch's fused attention ("sdpa": GPT-2, Qwen2 and most others) take it as it is. Two kinds of models do not, and
:func:`accept_document_masks` teaches them:

- Layers with a sliding window (Mistral, Gemma). transformers cuts a mask to the window when it builds the mask itself;
  a mask that it is given goes to every layer as it is.
- BLOOM. Its attention *adds* the mask to the scores, and its ALiBi bias wants the distance between tokens, which it
  derives from a padding mask and not from ``position_ids``.

Whether a family takes both kinds of batch is tried before a run starts: see :mod:`tutorial_lib.engine.trial`.
"""

from __future__ import annotations

import functools
import types
from typing import Any, TypeGuard

import torch
from transformers import PreTrainedModel

_SLIDING = "sliding_attention"  # transformers' name of such a layer, and of its mask


def accept_document_masks(model: PreTrainedModel) -> None:
    """Let a model take a boolean [B, 1, S, S] mask where it would misread one: sliding windows, added masks, ALiBi.

    A row of a packed mask says how many keys a token sees, itself included: one less is its position within its
    document. ALiBi built from these positions is the one that the document has when it is alone. (Positions counted
    over the whole row would give the same attention, as softmax ignores a constant per document, but with rounding
    errors that grow with the row.)
    """
    inner: Any = model.base_model
    if _window(model) is not None:
        inner.register_forward_pre_hook(_cut_to_window, with_kwargs=True)
    if model.config._attn_implementation != "sdpa":
        inner.register_forward_pre_hook(_boolean_mask_to_bias, with_kwargs=True)
        if hasattr(inner, "build_alibi_tensor"):
            inner.build_alibi_tensor = types.MethodType(_build_alibi, inner)


def slice_alibi(model: PreTrainedModel, tp: int, tp_rank: int) -> None:
    """Make a model with ALiBi give the biases of one tensor-parallel rank's heads; leave other models alone.

    A head's slope depends on its number among all heads. A model that is told of its own share of heads alone would
    give the first rank's slopes, or none of a larger model's, to every rank, and nothing would say so.

    Args:
        model: as :func:`load_model` gives it; its attention layers may have been split already.
        tp: tensor-parallel size.
        tp_rank: whose heads: the ``tp_rank``-th share of them.
    """
    inner: Any = model.base_model
    if hasattr(inner, "build_alibi_tensor"):
        heads = int(model.config.num_attention_heads)
        inner.num_heads = heads
        build = functools.partial(_build_alibi, inner)

        def build_share(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
            whole = build(attention_mask, num_heads, dtype).unflatten(0, (-1, heads))
            return whole.tensor_split(tp, dim=1)[tp_rank].flatten(0, 1)

        inner.build_alibi_tensor = build_share


def _window(model: PreTrainedModel) -> int | None:
    """Return how many keys the sliding layers of a model see, or None if it has no such layers."""
    text: Any = model.config.get_text_config()
    types = getattr(text, "layer_types", None)
    return getattr(text, "sliding_window", None) if types is None or _SLIDING in types else None


def _cut_to_window(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give sliding layers a mask of their own. A ready mask that transformers is given, it gives to every layer."""
    mask, window = kwargs.get("attention_mask"), _window(module)
    if mask is not None and _is_document_mask(mask) and window is not None:
        near = mask & mask.new_ones(mask.shape[-2:]).triu(1 - window)
        has_types = getattr(module.config.get_text_config(), "layer_types", None) is not None
        kwargs["attention_mask"] = {"full_attention": mask, _SLIDING: near} if has_types else near
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
    """Build BLOOM's biases for a padding mask [B, S], and from positions for a document mask [B, 1, S, S]."""
    build = functools.partial(type(self).build_alibi_tensor, self, num_heads=num_heads, dtype=dtype)
    if attention_mask.dim() != 4:
        return build(attention_mask)
    batch_size, _, _, length = attention_mask.shape
    positions_BS = (attention_mask[:, 0] == 0).sum(-1).sub(1).clamp(min=0)
    # For an unpadded row of the same length the builder gives slope * 0, 1, 2, ...: a table to look positions up in.
    table_HS = build(attention_mask.new_ones(1, length, dtype=torch.int64))[:, 0]
    return table_HS[:, positions_BS].transpose(0, 1).reshape(batch_size * num_heads, 1, length)
