"""Dimensions of a decoder-only transformer, and the number of parameters that follows from them.

Sources:
    GPT-3, arXiv:2005.14165, table 2.1 (up to 13 B and 175 B; its hidden size of 5140 for 13 B is a misprint for 5120)
    LLaMA, arXiv:2302.13971, table 2 (65 B)
    Llama 2, arXiv:2307.09288, section 2.2 (a vocabulary of 32,000 tokens)
    Scaling Laws for Neural Language Models, arXiv:2001.08361, section 2.1 (12 L h^2 parameters outside embeddings)

Checked: against the parameters of built models and published counts, in ``tests/unit/cli/test_plan.py`` and
``tests/unit/theory``. The dimensions of :func:`derive` are only plausible: models of the same size differ in shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PUBLISHED = (
    (125e6, 12, 768),
    (350e6, 24, 1024),
    (760e6, 24, 1536),
    (1.3e9, 24, 2048),
    (2.7e9, 32, 2560),
    (6.7e9, 32, 4096),
    (13e9, 40, 5120),
    (65e9, 80, 8192),
    (175e9, 96, 12288),
)
"""Parameters, layers and hidden size of published dense models: the shapes that :func:`derive` follows."""

VOCABULARY = 32_000
"""Size of the vocabulary if nothing is known: Llama 2's."""

_GROUPS = ((3000, 1024), (1900, 512), (512, 256), (0, 64))
"""Pairs of a minimum hidden size, and the multiple to round to from there on. The first pair that applies counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """Dimensions of a model's architecture.

    Args:
        layers: number of layers, L.
        hidden: hidden size, h.
        heads: number of query heads, a.
        vocabulary: size of the vocabulary, V.
        kv_heads: number of key and value heads; ``None`` means as many as query heads.
        intermediate: width of the MLP; ``None`` means 4 h.
        positions: number of learned position embeddings; 0 for rotary or ALiBi ones.
        gated: whether the MLP has three matrices (SwiGLU) instead of two.
        qkv_bias: whether the query, key and value projections add a bias.
        bias: whether the attention's output projection and the MLP add a bias.
        norm_vectors: number of vectors of h elements per norm: 2 for LayerNorm, 1 for RMSNorm.
        embedding_norm: whether there is a norm right after the embedding, as in BLOOM.
        tied: whether the output layer shares the embedding's weight.
        column_layers: number of separate projections per layer that are split by columns: 2 with one fused
            query-key-value projection and one MLP input, 5 with separate ones and a gated MLP.
        mlp_tensors: number of tensors as wide as the MLP that a layer keeps for backward; ``None`` means 4 if gated
            (gate, its activation, up, their product), otherwise 2 (the activation's input and output). GPT-2's
            tanh-GELU in Python keeps 5.
        fused_attention: whether attention runs in one kernel that keeps no matrix of scores. BLOOM's does not.
        tp_engines: this course's engines that can split the layers of such a model over a tensor-parallel group.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None
    intermediate: int | None = None
    positions: int = 0
    gated: bool = False
    qkv_bias: bool = False
    bias: bool = False
    norm_vectors: int = 1
    embedding_norm: bool = False
    tied: bool = False
    column_layers: int = 2
    mlp_tensors: int | None = None
    fused_attention: bool = True
    tp_engines: tuple[str, ...] = ("deepspeed", "fsdp")

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def embedding_params(self) -> int:
        """Elements of token and position embeddings, without a separate output layer."""
        return (self.vocabulary + self.positions) * self.hidden

    @property
    def layer_params(self) -> int:
        """Elements of one layer."""
        return self._divided_per_layer + self._replicated_per_layer

    @property
    def num_params(self) -> int:
        """Psi, with tied parameters counted once."""
        norms_outside = (1 + self.embedding_norm) * self.norm_vectors * self.hidden
        return self.embedding_params + norms_outside + self.layers * self.layer_params + self._own_output

    def replicated_params(self, engine: str) -> int:
        """Return R, the elements that every rank of a tensor-parallel group holds in full.

        Without sequence parallelism, these are the embeddings, the norms, and the biases of the two projections whose
        outputs are summed over the group. An output layer that is tied to the embedding is not split either. A separate
        one is split by DeepSpeed's AutoTP, but not by this course's plan for FSDP2.

        Args:
            engine: ``deepspeed`` or ``fsdp``.
        """
        split = self.layers * self._divided_per_layer + (0 if engine == "fsdp" else self._own_output)
        return self.num_params - split

    @property
    def key_value_width(self) -> int:
        """Width of the keys of all heads together; the same for the values."""
        return self.hidden // self.heads * self.key_value_heads

    @property
    def mlp_width(self) -> int:
        return self.intermediate or 4 * self.hidden

    @property
    def linear_widths(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a layer's matrices: query, key, value, output, then the MLP's."""
        h, kv, f = self.hidden, self.key_value_width, self.mlp_width
        mlp = ((h, f), (h, f), (f, h)) if self.gated else ((h, f), (f, h))
        return ((h, h), (h, kv), (h, kv), (h, h), *mlp)

    @property
    def _own_output(self) -> int:
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def _divided_per_layer(self) -> int:
        biases = self.qkv_bias * (self.hidden + 2 * self.key_value_width)
        biases += self.bias * (2 if self.gated else 1) * self.mlp_width
        return sum(rows * columns for rows, columns in self.linear_widths) + biases

    @property
    def _replicated_per_layer(self) -> int:
        return (2 * self.norm_vectors + 2 * self.bias) * self.hidden


def derive(
    num_params: float,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    vocabulary: int | None = None,
) -> Dimensions:
    """Derive plausible dimensions for a model of ``num_params`` parameters; given dimensions are kept.

    The published model nearest in size gives the ratio r = h / L. Then ``12 L h^2 = 12 h^3 / r`` parameters give h,
    rounded so that many devices can share the heads (of 128 elements from h = 2048 on, of 64 below), and L follows. The
    MLP is 4 h wide, the output layer has its own weights, and every query head has its own key and value head.

    Raises:
        ValueError: the size is outside 1e7 to 1e14, the dimensions make a model more than a fifth larger or smaller, or
            heads do not divide hidden.
    """
    if not 1e7 <= num_params <= 1e14:
        raise ValueError(f"model-size is {num_params:g}; write a number of parameters from 1e7 to 1e14, such as 7e9.")
    vocabulary = vocabulary or min(VOCABULARY, max(256, int(num_params / 1000)))
    _, near_layers, near_hidden = min(PUBLISHED, key=lambda known: abs(math.log(known[0] / num_params)))
    if hidden is None:
        ratio = near_hidden / near_layers
        exact = math.sqrt(num_params / (12 * layers)) if layers else (ratio * num_params / 12) ** (1 / 3)
        group = heads or next(group for least, group in _GROUPS if exact >= least)
        hidden = max(group, round(exact / group) * group)
    if heads is None:
        size = 128 if hidden >= 2048 else 64
        heads = hidden // size if hidden % size == 0 else math.gcd(hidden, 8)
    if hidden % heads:
        raise ValueError(f"hidden={hidden} is not a multiple of heads={heads}. Write heads that divide hidden.")
    if layers is None:
        layers = max(1, round((num_params - 2 * vocabulary * hidden) / (12 * hidden * hidden)))
    derived = Dimensions(layers=layers, hidden=hidden, heads=heads, vocabulary=vocabulary)
    if abs(derived.num_params / num_params - 1) > 0.2:
        raise ValueError(
            f"layers={layers}, hidden={hidden} and vocabulary={vocabulary} make {derived.num_params / 1e9:.3g} B "
            f"parameters, not {num_params / 1e9:.3g} B. Write a model-size of {derived.num_params:.3g}, or other "
            "dimensions."
        )
    return derived
