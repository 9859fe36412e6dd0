"""GPT-2's fused QKV projection: query, key and value are three blocks of columns of one matrix.

A column-parallel rank needs its heads' columns from all three blocks, but tensors are cut into contiguous pieces. So
the columns are sorted by rank first, here for two ranks. Each letter is half of a block's columns::

    by part   [ Q q | K k | V v ]      the order in transformers and in every saved model
    by rank   [ Q K V | q k v ]        the order that can be cut in two

Qwen2 has three separate matrices. BLOOM's fused matrix is ordered by head, each with its query, key and value, so
contiguous heads are contiguous columns and nothing needs to move.
"""

from __future__ import annotations

from torch import Tensor

_PARTS = 3


def is_fused_by_part(name: str, model_type: str) -> bool:
    """Return whether the parameter ``name`` holds query, key and value as three blocks of its last dimension."""
    return model_type == "gpt2" and ".attn.c_attn." in name


def by_rank(tensor: Tensor, tp: int) -> Tensor:
    """Reorder the last dimension, of size 3h, from parts to ranks."""
    return tensor.unflatten(-1, (_PARTS, tp, -1)).transpose(-3, -2).flatten(-3)


def by_part(tensor: Tensor, tp: int) -> Tensor:
    """Reorder the last dimension back, from ranks to parts."""
    return tensor.unflatten(-1, (tp, _PARTS, -1)).transpose(-3, -2).flatten(-3)
