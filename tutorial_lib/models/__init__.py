"""Models and tokenizers from a hub name, a directory or the embedded default: one code path for all three."""

from tutorial_lib.models.limits import check_sequence_length, check_tensor_parallel, check_vocabulary
from tutorial_lib.models.loading import (
    build_model,
    freeze_parameters,
    load_config,
    load_model,
    load_tokenizer,
    load_trained_config,
    set_activation_checkpointing,
)
from tutorial_lib.models.masks import slice_alibi

__all__ = [
    "build_model",
    "check_sequence_length",
    "check_tensor_parallel",
    "check_vocabulary",
    "freeze_parameters",
    "load_config",
    "load_model",
    "load_tokenizer",
    "load_trained_config",
    "set_activation_checkpointing",
    "slice_alibi",
]
