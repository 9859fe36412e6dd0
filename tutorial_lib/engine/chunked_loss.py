"""Chunked loss: output layer and loss computed a few tokens at a time, so that the logits never exist all at once.

Shape legend: B sequences of a micro-batch, S tokens, H hidden size, V vocabulary, N = B (S - 1) predicted tokens.

A language model ends with ``logits_NV = hidden_NH @ weight_VH.T``. The loss needs the logits in fp32, and their
gradient is just as large: with BLOOM's V = 250,880 and N = 4096, each takes 4.1 GB, for a model of 560 million
parameters. PyTorch's ``linear_cross_entropy`` computes the output layer, the loss and the gradient for a chunk of
tokens, then frees the chunk's logits. With ``loss_chunks=8``, only an eighth of them exist at a time.

The loss is computed inside the output layer's own ``forward``, so ZeRO-3 and FSDP2 gather the layer's weight as usual.
Under tensor parallelism, an output layer that is tied to the embedding stays in full on every rank. AutoTP splits any
other output layer over the vocabulary, and :mod:`~tutorial_lib.engine.deepspeed.autotp` computes the loss.
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

LossSum = Callable[[Any, Tensor, Tensor, int], Tensor]
"""Function that sums an output layer's losses over hidden states (N, H) and targets (N), a chunk at a time."""


def output_loss(model: Any, num_chunks: int, split_loss_sum: LossSum | None = None) -> ContextForBatch:
    """Prepare a model's output layer for a chunked loss, if there is more than one chunk.

    Args:
        model: a causal language model whose logits are the result of its output layer.
        num_chunks: number of chunks that the tokens of a micro-batch are split into.
        split_loss_sum: function for an output layer that is split over the vocabulary; None for a layer in one piece.

    Returns:
        A function that takes a batch and returns the context to run the model in. There, the model returns the sum of
        the batch's losses in place of logits. With one chunk, or without labels, it returns logits as usual.
    """
    if num_chunks == 1:
        return lambda batch: nullcontext()
    chunked = ChunkedLoss(model, num_chunks, split_loss_sum)
    return lambda batch: chunked.with_labels(batch.get("labels"))


class ChunkedLoss:
    """Makes a model return the sum of its next-token losses instead of logits, if it is given labels.

    Args:
        model: as for :func:`output_loss`.
        num_chunks: number of chunks.
        split_loss_sum: function for a split output layer.

    Raises:
        ConfigError: the model's output layer is not a linear layer.
    """

    def __init__(self, model: Any, num_chunks: int, split_loss_sum: LossSum | None = None) -> None:
        layer = model.get_output_embeddings()
        if split_loss_sum is None and not isinstance(layer, nn.Linear):
            raise ConfigError(
                f"loss_chunks={num_chunks} needs a linear output layer, and this model has {type(layer).__name__}. "
                "Leave loss_chunks out."
            )
        self._layer: Any = layer
        self._num_chunks = num_chunks
        self._loss_sum = split_loss_sum or _loss_sum
        self._labels_BS: Tensor | None = None
        self._logits = layer.forward
        layer.forward = self._forward

    @contextmanager
    def with_labels(self, labels_BS: Tensor | None) -> Iterator[None]:
        """Make the output layer return the sum of losses while the block runs; with None it returns logits as usual."""
        self._labels_BS = labels_BS
        try:
            yield
        finally:
            self._labels_BS = None

    def _forward(self, hidden_BSH: Tensor) -> Tensor:
        if self._labels_BS is None:
            logits: Tensor = self._logits(hidden_BSH)
            return logits
        hidden_NH = hidden_BSH[:, :-1].flatten(0, 1)
        targets_N = self._labels_BS[:, 1:].flatten().to(hidden_NH.device, non_blocking=True)
        return self._loss_sum(self._layer, hidden_NH, targets_N, math.ceil(len(targets_N) / self._num_chunks))


def _loss_sum(layer: nn.Linear, hidden_NH: Tensor, targets_N: Tensor, chunk_size: int) -> Tensor:
    """Sum the losses of an output layer that this rank holds in full."""
    weight_VH: Tensor = layer.weight
    bias_V: Tensor | None = layer.bias
    kind = hidden_NH.device.type
    if torch.is_autocast_enabled(kind):  # the operator below ignores autocast
        dtype = torch.get_autocast_dtype(kind)
        hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    # In 16 bits the operator would also sum in 16 bits, which leaves two or three correct digits.
    is_exact = hidden_NH.dtype == torch.float32
    losses = F.linear_cross_entropy(
        hidden_NH,
        weight_VH,
        targets_N,
        linear_bias=bias_V,
        reduction="sum" if is_exact else "none",
        ignore_index=-100,
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size),
    )
    return losses if is_exact else losses.float().sum()
