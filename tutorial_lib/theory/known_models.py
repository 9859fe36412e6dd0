"""Dimensions of public models, by name ("llama-3-70b") or by nominal size (``70e9``).

Sources: the models' ``config.json`` on the Hugging Face hub, and their papers: GPT-2 (Radford et al., 2019), BLOOM
(arXiv:2211.05100), LLaMA (arXiv:2302.13971), Llama 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783, table 3), Mistral
7B (arXiv:2310.06825), Qwen2 (arXiv:2407.10671). Checked against published parameter counts in ``tests/unit/theory``.
"""

from __future__ import annotations

from typing import Any

from tutorial_lib.theory.dimensions import Dimensions


def _llama(layers: int, hidden: int, heads: int, intermediate: int, **more: Any) -> Dimensions:
    shape: dict[str, Any] = {"vocabulary": 32_000, "column_layers": 5, "tp_engines": ("deepspeed",), **more}
    return Dimensions(layers=layers, hidden=hidden, heads=heads, intermediate=intermediate, gated=True, **shape)


def _gpt2(layers: int, hidden: int, heads: int) -> Dimensions:
    return Dimensions(
        layers=layers, hidden=hidden, heads=heads, vocabulary=50_257, positions=1024, qkv_bias=True, bias=True,
        norm_vectors=2, tied=True, mlp_tensors=5, tp_engines=("fsdp",),
    )  # fmt: skip


_THREE: dict[str, Any] = {"kv_heads": 8, "vocabulary": 128_256}
_QWEN2: dict[str, Any] = {"qkv_bias": True, "tp_engines": ("deepspeed", "fsdp")}

MODELS: dict[str, Dimensions] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "bloom-560m": Dimensions(
        layers=24, hidden=1024, heads=16, vocabulary=250_880, qkv_bias=True, bias=True, norm_vectors=2,
        embedding_norm=True, tied=True, fused_attention=False,
    ),
    "llama-2-7b": _llama(32, 4096, 32, 11_008),
    "llama-2-13b": _llama(40, 5120, 40, 13_824),
    "llama-2-70b": _llama(80, 8192, 64, 28_672, kv_heads=8),
    "llama-3-8b": _llama(32, 4096, 32, 14_336, **_THREE),
    "llama-3-70b": _llama(80, 8192, 64, 28_672, **_THREE),
    "llama-3-405b": _llama(126, 16_384, 128, 53_248, **_THREE),
    "mistral-7b": _llama(32, 4096, 32, 14_336, kv_heads=8),
    "qwen2-0.5b": _llama(24, 896, 14, 4864, kv_heads=2, vocabulary=151_936, tied=True, **_QWEN2),
    "qwen2-7b": _llama(28, 3584, 28, 18_944, kv_heads=4, vocabulary=152_064, **_QWEN2),
}  # fmt: skip


HUB_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "bloom-560m": "bigscience/bloom-560m",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3-405b": "meta-llama/Llama-3.1-405B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "qwen2-0.5b": "Qwen/Qwen2-0.5B",
    "qwen2-7b": "Qwen/Qwen2-7B",
}
"""Names of :data:`MODELS` on the Hugging Face hub, for a command that loads their weights."""


_USUALLY_MEANT = {7e9: "llama-2-7b"}
"""Models that people usually mean by a size that is close to several: Llama 2 has 6.74 B, Mistral 7.24 B."""


def nearest_model(num_params: float) -> str | None:
    """Return the name of the public model nearest in size, or None if none is within 5 %.

    By "70B" people mean a model with grouped-query attention and a vocabulary of 128,256: a shape derived only from the
    size would miss both.
    """
    if num_params in _USUALLY_MEANT:
        return _USUALLY_MEANT[num_params]

    def distance(name: str) -> float:
        return abs(MODELS[name].num_params / num_params - 1)

    name = min(MODELS, key=distance)
    return name if distance(name) <= 0.05 else None
