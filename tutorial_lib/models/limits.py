"""Limits of a model: its longest sequence, its range of token ids, and the tensor-parallel sizes that divide it."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tutorial_lib.config import ConfigError


def check_sequence_length(seq_length: int, model_config: PretrainedConfig) -> None:
    """Refuse sequences with more tokens than the model has positions.

    Raises:
        ConfigError: ``seq_length`` exceeds the model's limit.
    """
    text: Any = model_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # MPT's name for it
    if limit and seq_length > limit > 0:  # XLNet says -1, and BLOOM, with ALiBi, nothing
        raise ConfigError(
            f"seq_length={seq_length} is longer than this {model_config.model_type} model's {limit} positions. "
            f"Write seq_length={limit} or less."
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for, such as ids of tokens that were added later.

    Raises:
        ConfigError: names such a token, its id and the size of the embedding.
    """
    rows = int(model_config.get_text_config().vocab_size)
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= rows:
        raise ConfigError(
            f"The tokenizer gives {token!r} the id {highest}, but this {model_config.model_type} model only has "
            f"embeddings for the ids 0 to {rows - 1} (vocab_size={rows}). Use tokenizer files without the added "
            f"tokens, or enlarge the model once with model.resize_token_embeddings({highest + 1}) and save it with "
            "save_pretrained."
        )


def check_tensor_parallel(tp: int, model_config: PretrainedConfig) -> None:
    """Refuse a tensor-parallel size that cannot give every rank the same share of every layer.

    Each rank computes complete attention heads, so ``tp`` must divide the query heads and the key-value heads. It must
    also divide the width of the MLP and, if the output layer has its own weights, the vocabulary. Tied embeddings are
    not split.

    Args:
        tp: tensor-parallel size.
        model_config: the model's dimensions.

    Raises:
        ConfigError: names the numbers that ``tp`` does not divide, and the values of ``tp`` that work.
    """
    if tp == 1:
        return
    text: Any = model_config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", None) or 0)
    if not heads:
        raise ConfigError(f"tp={tp} splits attention heads, and this {text.model_type} model has none. Write tp=1.")
    sizes = {
        "attention heads": heads,
        "key-value heads": int(getattr(text, "num_key_value_heads", None) or heads),
        # In GPT-2 and BLOOM this is four times the hidden size, unless the configuration says otherwise.
        "columns of each MLP": int(
            getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
        ),
    }
    if not getattr(text, "tie_word_embeddings", True):
        sizes["entries of the vocabulary"] = int(text.vocab_size)
    problems = [f"{size} {what}" for what, size in sizes.items() if size % tp]
    if problems:
        common = math.gcd(*sizes.values())
        fitting = [size for size in range(1, common + 1) if common % size == 0]
        raise ConfigError(
            f"tp={tp} does not divide this {text.model_type} model's {' nor '.join(problems)}. "
            f"Write tp as one of {fitting}, or choose another model."
        )
