"""Next-token loss, summed over tokens so that every token has the same weight across ranks and micro-batches.

Shape legend: B sequences of a micro-batch, S tokens, V vocabulary.

The loss of an optimizer step is the mean over all of its tokens, on every rank and in every micro-batch. Ranks hold
different numbers of tokens, so a mean of per-rank means would give tokens different weights, in the reported loss
and, worse, in the gradient. A training loop therefore counts the step's tokens first (one small all-gather), divides
every micro-batch's loss *sum* by that count, and adds up the results.

The same all-gathers check that the ranks of a tensor-parallel group agree (:mod:`tutorial_lib.trainer.rank_agreement`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tutorial_lib.config import ConfigError
from tutorial_lib.dataloader import Batch
from tutorial_lib.dataloader.collate import fingerprint
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import all_gather_ints
from tutorial_lib.trainer.rank_agreement import check_batches, check_losses


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is NaN or infinite. The message names the newest checkpoint, if there is one."""


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum up next-token cross-entropies, in fp32.

    Args:
        logits: (B, S, V); from an engine that computes the loss in chunks (``loss_chunks``), the sum itself.
        labels: (B, S), on any device, not shifted; -100 marks tokens that are ignored.
    """
    if logits.dim() == 0:
        return logits
    vocabulary = logits.size(-1)
    targets = labels[:, 1:].to(logits.device, non_blocking=True)
    return F.cross_entropy(
        logits[:, :-1].float().reshape(-1, vocabulary), targets.reshape(-1), ignore_index=-100, reduction="sum"
    )


def count_targets(labels: Tensor) -> int:
    """Count the positions of ``labels`` (B, S) that enter :func:`token_loss_sum`, on this rank only."""
    return int((labels[:, 1:] != -100).sum())


def count_tokens(micro_batches: Sequence[Batch], topology: Topology, *, step: int | None = None) -> int:
    """Count the tokens of an optimizer step that enter the loss, over all ranks. Collective.

    Args:
        micro_batches: this rank's share of the global batch.
        topology: this rank's place in the grid. Ranks that share a layer read the same tokens, which count once.
        step: number of the step, for messages.

    Raises:
        ConfigError: no token of the step enters the loss.
        RanksDisagree: the ranks of a tensor-parallel group read different batches; all ranks raise.
    """
    own = sum(count_targets(batch["labels"]) for batch in micro_batches)
    by_rank = all_gather_ints([own, fingerprint(micro_batches) if topology.tp > 1 else 0])
    check_batches(topology, step, [batches for _, batches in by_rank])
    total = sum(tokens for tokens, _ in by_rank[:: topology.tp])
    if total == 0:
        width = max(batch["labels"].size(1) for batch in micro_batches)
        raise ConfigError(
            f"No token of {'this step' if step is None else f'step {step}'} enters the loss: every label is masked. "
            f"Raise seq_length ({width}), so that answers are not cut off."
        )
    return total


def sum_over_ranks(value: float | Tensor, topology: Topology, *, step: int | None = None) -> float:
    """Add up a number over the data-parallel ranks, in fp64. Collective.

    Args:
        value: this rank's sum of losses.
        topology: this rank's place in the grid. Ranks that share a layer have the same sum, which counts once.
        step: number of the step, for messages.

    Raises:
        RanksDisagree: the sum differs within a tensor-parallel group; all ranks raise.
    """
    # Send the number as an integer, so that its bits arrive unchanged.
    own = value.item() if isinstance(value, Tensor) else value
    bits = torch.tensor(own, dtype=torch.float64).view(torch.int64)
    by_rank = torch.tensor(all_gather_ints([int(bits)])).view(torch.float64).flatten()
    check_losses(topology, step, by_rank.tolist())
    return float(by_rank[:: topology.tp].sum())
