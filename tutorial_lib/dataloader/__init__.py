"""Data loading: from rows of text to batches of tokens, sharded by data-parallel rank, and resumable.

:mod:`~tutorial_lib.dataloader.rows` finds the data, ``tokens`` turns rows into documents of tokens, ``packing`` lets
documents share a row, ``sampler`` decides which rows make up which step, ``collate`` builds the tensors, and
``loaders`` puts it all together. ``subset`` knows which rows the ZeRO workshop uses.

The examples of optimizer step k depend only on the data settings, the tokenizer, the seed and the global batch: never
on the number of ranks, micro-batches, the launcher or a resume. That makes the same step of two runs comparable.
"""

from tutorial_lib.dataloader.collate import Batch
from tutorial_lib.dataloader.loaders import (
    EpochLoader,
    EvalLoader,
    TrainLoader,
    build_epoch_loader,
    build_eval_loader,
    build_train_loader,
    check_data,
    data_identity,
)
from tutorial_lib.dataloader.rows import load_rows
from tutorial_lib.dataloader.sampler import StepSampler
from tutorial_lib.dataloader.tokens import tokenize_rows

__all__ = [
    "Batch",
    "EpochLoader",
    "EvalLoader",
    "StepSampler",
    "TrainLoader",
    "build_epoch_loader",
    "build_eval_loader",
    "build_train_loader",
    "check_data",
    "data_identity",
    "load_rows",
    "tokenize_rows",
]
