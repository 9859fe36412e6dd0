"""GPT-2's fused projection: query, key and value are three blocks of columns of one matrix.

A column-parallel rank needs its heads' columns of all three blocks, and tensors are cut into contiguous pieces. So the
columns are put in the order of the ranks first; here for two ranks, each letter half of a block's columns::

    by part   [ Q q | K k | V v ]      what transformers and every saved model has
    by rank   [ Q K V | q k v ]        what is cut in two

Qwen2 has three matrices. BLOOM's fused matrix goes head by head, each with its query, key and value: contiguous heads
are contiguous columns, and nothing needs to move.
"""

from __future__ import annotations

from torch import Tensor

_PARTS = 3


def is_fused_by_part(name: str, model_type: str) -> bool:
    """Return whether the parameter called ``name`` holds query, key and value as three blocks of its last dimension."""
    return model_type == "gpt2" and ".attn.c_attn." in name


def by_rank(tensor: Tensor, tp: int) -> Tensor:
    """Reorder the last dimension, of size 3h, from parts to ranks."""
    return tensor.unflatten(-1, (_PARTS, tp, -1)).transpose(-3, -2).flatten(-3)


def by_part(tensor: Tensor, tp: int) -> Tensor:
    """Reorder the last dimension back, from ranks to parts."""
    return tensor.unflatten(-1, (tp, _PARTS, -1)).transpose(-3, -2).flatten(-3)
