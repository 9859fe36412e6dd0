"""Chunked loss: output layer and loss computed a few tokens at a time, so that the logits never exist all at once.

Shape legend: B sequences of a micro-batch, S tokens, H hidden size, V vocabulary, N = B (S - 1) predicted tokens.

A language model ends with ``logits_NV = hidden_NH @ weight_VH.T``. The loss needs the logits in fp32, and their
gradient is just as large: with BLOOM's V = 250,880 and N = 4096, each takes 4.1 GB, for a model of 560 million
parameters. PyTorch's ``linear_cross_entropy`` computes the output layer, the loss and the gradient for a chunk of
tokens, then frees the chunk's logits. With ``loss_chunks=8``, only an eighth of them exist at a time.

The output layer must have its full weight while it computes. ZeRO-3 and FSDP2 gather it like every layer, because the
loss is computed inside its own ``forward``. Tensor parallelism would split it, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_lib.config import ConfigError

ContextForBatch = Callable[[dict[str, Tensor]], AbstractContextManager[None]]
"""Function that takes a batch, and returns the context to run the model in."""


def output_loss(model: Any, num_chunks: int) -> ContextForBatch:
    """Prepare a model's output layer for a chunked loss, if there is more than one chunk.

    Returns:
        A context to run the model in: there, its "logits" are the sum of the batch's losses. With one chunk, or for a
        batch without labels, they stay logits.
    """
    if num_chunks == 1:
        return lambda batch: nullcontext()
    chunked = ChunkedLoss(model, num_chunks)
    return lambda batch: chunked.with_labels(batch.get("labels"))


class ChunkedLoss:
    """Makes a model return the sum of its next-token losses instead of logits, if it is given labels.

    Args:
        model: a causal language model whose logits are the result of its output layer.
        num_chunks: number of chunks that the tokens of a micro-batch are split into.

    Raises:
        ConfigError: its output layer is not a linear layer.
    """

    def __init__(self, model: Any, num_chunks: int) -> None:
        layer = model.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise ConfigError(
                f"loss_chunks={num_chunks} needs a linear output layer, and this model has {type(layer).__name__}. "
                "Leave loss_chunks out."
            )
        self._layer: Any = layer
        self._num_chunks = num_chunks
        self._labels_BS: Tensor | None = None
        layer.forward = self._forward  # type: ignore[method-assign, assignment]

    @contextmanager
    def with_labels(self, labels_BS: Tensor | None) -> Iterator[None]:
        """Make the output layer return the sum of losses while the block runs; with None it returns logits as usual."""
        self._labels_BS = labels_BS
        try:
            yield
        finally:
            self._labels_BS = None

    def _forward(self, hidden_BSH: Tensor) -> Tensor:
        weight_VH: Tensor = self._layer.weight
        bias_V: Tensor | None = self._layer.bias
        if self._labels_BS is None:
            return F.linear(hidden_BSH, weight_VH, bias_V)
        kind = hidden_BSH.device.type
        if torch.is_autocast_enabled(kind):  # the operator below ignores autocast
            dtype = torch.get_autocast_dtype(kind)
            hidden_BSH, weight_VH = hidden_BSH.to(dtype), weight_VH.to(dtype)
            bias_V = None if bias_V is None else bias_V.to(dtype)
        hidden_NH = hidden_BSH[:, :-1].flatten(0, 1)
        targets_N = self._labels_BS[:, 1:].flatten().to(hidden_NH.device, non_blocking=True)
        # In 16 bits the operator would also sum in 16 bits: a sum of thousands would lose three digits.
        is_exact = hidden_NH.dtype == torch.float32
        losses = F.linear_cross_entropy(
            hidden_NH,
            weight_VH,
            targets_N,
            linear_bias=bias_V,
            reduction="sum" if is_exact else "none",
            ignore_index=-100,
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=math.ceil(len(targets_N) / self._num_chunks)),
        )
        return losses if is_exact else losses.float().sum()
