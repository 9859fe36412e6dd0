"""The training loop, its loss and its checks: the same for every engine and every launcher."""

from tutorial_lib.trainer.loop import (
    NonFiniteLoss,
    OnCheckpoint,
    count_tokens,
    local_device,
    output_to,
    seed_everything,
    token_loss_sum,
    train,
    train_all,
)

__all__ = [
    "NonFiniteLoss",
    "OnCheckpoint",
    "count_tokens",
    "local_device",
    "output_to",
    "seed_everything",
    "token_loss_sum",
    "train",
    "train_all",
]
