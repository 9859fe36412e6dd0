"""Loss of the output layer in chunks of tokens, so that a micro-batch's logits never exist all at once.

Shape legend: B sequences of a micro-batch, S tokens, H hidden size, V vocabulary, N = B (S - 1) predicted tokens.

A language model ends with ``logits_NV = hidden_NH @ weight_VH.T``. The loss needs them in fp32, and its gradient is as
large again: with BLOOM's V = 250,880 and N = 4096, 4.1 GB each, beside a model of 560 million parameters. PyTorch's
``linear_cross_entropy`` computes the output layer, the loss and the gradient for a chunk of tokens, then forgets the
chunk's logits. With ``loss_chunks=8`` an eighth of them exists at a time.

The output layer has to be whole where it computes. ZeRO-3 and FSDP2 gather it as they gather every layer, because the
loss is computed inside its own ``forward``; tensor parallelism splits it, and is refused.
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

GivenBatch = Callable[[dict[str, Tensor]], AbstractContextManager[None]]
"""Returns the block in which a model goes through a batch."""


def output_loss(model: Any, num_chunks: int) -> GivenBatch:
    """Prepare a model's output layer for the loss in chunks, if there are several.

    Returns:
        The block to run the model in: there its "logits" are the sum of the batch's losses. With one chunk, and of a
        batch without labels, they are logits.
    """
    if num_chunks == 1:
        return lambda batch: nullcontext()
    chunked = ChunkedLoss(model, num_chunks)
    return lambda batch: chunked.given(batch.get("labels"))


class ChunkedLoss:
    """Makes a model return the sum of its next-token losses in the place of logits, where it is given labels.

    Args:
        model: a causal language model whose logits are what its output layer returns.
        num_chunks: pieces in which the tokens of a micro-batch are taken.

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
    def given(self, labels_BS: Tensor | None) -> Iterator[None]:
        """Let the output layer return the sum of losses while the block runs; with None it returns logits as ever."""
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
        if torch.is_autocast_enabled(kind):  # the operator below does not know of it
            dtype = torch.get_autocast_dtype(kind)
            hidden_BSH, weight_VH = hidden_BSH.to(dtype), weight_VH.to(dtype)
            bias_V = None if bias_V is None else bias_V.to(dtype)
        hidden_NH = hidden_BSH[:, :-1].flatten(0, 1)
        targets_N = self._labels_BS[:, 1:].flatten().to(hidden_NH.device, non_blocking=True)
        # In 16 bits the operator's sum would have 16 bits as well: a sum of thousands would lose three digits.
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
