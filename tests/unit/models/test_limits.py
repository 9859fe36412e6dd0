"""Limits: refusals of sequences and tensor-parallel sizes that a model's dimensions do not allow."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from tutorial_lib.config import ConfigError
from tutorial_lib.embedded import MODEL_NAMES
from tutorial_lib.models import (
    check_sequence_length,
    check_tensor_parallel,
    check_vocabulary,
    load_config,
    load_tokenizer,
)

families = pytest.mark.parametrize("name", MODEL_NAMES)


def test_sequence_length_beyond_the_models():
    check_sequence_length(512, load_config("embedded/gpt2"))
    check_sequence_length(100_000, load_config("embedded/bloom"))
    with pytest.raises(ConfigError, match=r"seq_length=513 is longer than this gpt2 model's 512 positions\. Write"):
        check_sequence_length(513, load_config("embedded/gpt2"))


def test_mpt_has_another_name_for_its_limit():
    with pytest.raises(ConfigError, match=r"seq_length=65 is longer than this mpt model's 64 positions"):
        check_sequence_length(65, AutoConfig.for_model("mpt", max_seq_len=64))


def test_a_maximum_length_of_minus_one_means_no_limit():
    check_sequence_length(100_000, AutoConfig.for_model("xlnet"))


def test_a_model_without_heads_is_not_split():
    with pytest.raises(ConfigError, match=r"tp=2 splits attention heads, and this mamba model has none\. Write tp=1"):
        check_tensor_parallel(2, AutoConfig.for_model("mamba"))


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({}, 3, "8 attention heads nor 4 key-value heads nor 320 columns"),
        ({}, 8, r"model's 4 key-value heads. Write tp as one of \[1, 2, 4\]"),
        ({"intermediate_size": 322}, 4, r"model's 322 columns of each MLP. Write tp as one of \[1, 2\]"),
        (
            {"tie_word_embeddings": False, "vocab_size": 2049},
            2,
            r"2049 entries of the vocabulary. Write tp as one of \[1\]",
        ),
    ],
)
def test_a_size_that_does_not_divide_the_model_names_those_that_do(changes, tp, message):
    config = load_config("embedded/qwen2")
    config.update(changes)
    with pytest.raises(ConfigError, match=f"tp={tp} does not divide this qwen2.*{message}"):
        check_tensor_parallel(tp, config)
    check_tensor_parallel(1, config)


@families
def test_sizes_that_divide_are_accepted(name):
    for tp in (1, 2, 4):
        check_tensor_parallel(tp, load_config(name))


def test_tied_embeddings_are_not_split_so_their_vocabulary_does_not_matter():
    check_tensor_parallel(2, AutoConfig.for_model("gpt2", vocab_size=50257))


@families
def test_a_tokenizer_whose_ids_fit_the_embedding_is_accepted(name):
    check_vocabulary(load_tokenizer(name), load_config(name))


def test_an_added_token_beyond_the_embedding_is_named_with_both_numbers():
    tokenizer = load_tokenizer("embedded/gpt2")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ConfigError, match=r"gives '\[PAD\]' the id 2048.*ids 0 to 2047 \(vocab.*resize.*\(2049\)"):
        check_vocabulary(tokenizer, load_config("embedded/gpt2"))
