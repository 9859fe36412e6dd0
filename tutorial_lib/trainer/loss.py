"""Next-token loss, summed over tokens so that ranks and micro-batches weigh every token alike.

Shape legend: B sequences of a micro-batch, S tokens, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is no longer a number. The message names the last good checkpoint."""


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of next-token cross-entropies, in fp32.

    Args:
        logits: (B, S, V).
        labels: (B, S), not shifted; -100 marks tokens that do not count.
    """
    vocabulary = logits.size(-1)
    return F.cross_entropy(
        logits[:, :-1].float().reshape(-1, vocabulary), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


def count_tokens(labels: Tensor) -> int:
    """How many positions of ``labels`` (B, S) enter :func:`token_loss_sum`."""
    return int((labels[:, 1:] != -100).sum())
