"""Rows -> token blocks and labels; sharded by data-parallel rank; resumable.

:mod:`~tutorial_lib.dataloader.rows` finds the data, ``tokens`` turns rows into documents of tokens, ``packing`` lets
documents share a row, ``sampler`` says which rows make up which step, ``collate`` builds the tensors, and ``loaders``
puts them together.

Which examples make up optimizer step k depends on the data settings, the seed and the global batch alone: never on the
number of ranks, micro-batches, the launcher or a resume. So the same step of two runs can be compared.
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
from tutorial_lib.dataloader.tokens import tokenize_rows

__all__ = [
    "Batch",
    "EpochLoader",
    "EvalLoader",
    "TrainLoader",
    "build_epoch_loader",
    "build_eval_loader",
    "build_train_loader",
    "check_data",
    "data_identity",
    "load_rows",
    "tokenize_rows",
]
