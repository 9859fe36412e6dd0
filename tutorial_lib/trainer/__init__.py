"""Training loop, loss and consistency checks: the same for every engine and every launcher."""

from tutorial_lib.trainer.loop import Trainer
from tutorial_lib.trainer.loss import NonFiniteLoss, count_targets, count_tokens, sum_over_ranks, token_loss_sum
from tutorial_lib.trainer.rank import train, train_all
from tutorial_lib.trainer.result import Result

__all__ = [
    "NonFiniteLoss",
    "Result",
    "Trainer",
    "count_targets",
    "count_tokens",
    "sum_over_ranks",
    "token_loss_sum",
    "train",
    "train_all",
]
