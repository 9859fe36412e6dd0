"""The training loop, its loss and its checks: the same for every engine and every launcher."""

from tutorial_lib.trainer.loop import Trainer, train, train_all
from tutorial_lib.trainer.loss import NonFiniteLoss, count_tokens, token_loss_sum

__all__ = ["NonFiniteLoss", "Trainer", "count_tokens", "token_loss_sum", "train", "train_all"]
