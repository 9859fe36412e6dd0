"""Selective activation checkpointing: keep the results that are slow to recompute, and recompute all others.

The policy is torchtitan's, per operator (``parallelize_llama.py`` of December 2024): keep the output of each fused
attention kernel and of every second matrix product in a layer. Attention without a fused kernel is recomputed.

After ZeRO-3 has built a model, ``torch.nn.functional.linear`` is DeepSpeed's, which adds the bias to the product in
place. PyTorch does not notice that a kept product has changed, and the second forward would add the bias twice. So
these contexts put PyTorch's own function back.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_ATEN = torch.ops.aten
_ATTENTION = {
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default}


class _SlowOperators(TorchDispatchMode):
    """Pass the slow operators to one of PyTorch's modes, and run all others as usual.

    PyTorch's modes expect the second forward to call the same operators as the first. The hooks of ZeRO-3 do not: they
    gather a parameter only if this rank does not hold it, and free it only if it is not needed soon.
    """

    def __init__(self, inner: TorchDispatchMode) -> None:
        super().__init__()
        self._inner = inner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS or func in _ATTENTION:
            return self._inner.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs or {})


class _PlainLinear:
    """Enter another context, with PyTorch's own linear function."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __enter__(self) -> None:
        self._replaced, functional.linear = functional.linear, torch._C._nn.linear
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> Any:
        functional.linear = self._replaced
        return self._inner.__exit__(*error)


def keep_slow_results() -> tuple[Any, Any]:
    """Return the contexts of one layer's forward and of its second forward, for ``torch.utils.checkpoint``."""
    seen: Counter[bool] = Counter()

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operator in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        seen[context.is_recompute] += 1
        keeps = seen[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    forward, again = create_selective_checkpoint_contexts(policy)
    return _PlainLinear(_SlowOperators(forward)), _PlainLinear(_SlowOperators(again))
