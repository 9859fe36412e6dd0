"""Embedded models: their sizes, weights and tokenizers, and the effect of pretraining."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutorial_lib.embedded import (
    CONFIG_ONLY_NAMES,
    MODEL_NAMES,
    model_directory,
)
from tutorial_lib.embedded.corpora import rows
from tutorial_lib.embedded.pretrain import SAMPLE, sample_loss


@pytest.fixture(scope="module", params=MODEL_NAMES)
def embedded(request):
    directory = model_directory(request.param)
    model = AutoModelForCausalLM.from_pretrained(directory)
    return request.param, directory, model, AutoTokenizer.from_pretrained(directory)


def test_weights_are_small_and_fp32(embedded):
    _, directory, model, _ = embedded
    file = directory / "model.safetensors"
    assert file.stat().st_size < 3_000_000
    with safe_open(file, "pt") as tensors:
        assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.float32}
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((directory / "pretraining.json").read_text())["parameters"]
    )


def test_dimensions_divide_over_four_ranks(embedded):
    name, _, model, tokenizer = embedded
    config = model.config
    assert config.vocab_size == len(tokenizer) == 2048
    assert config.num_attention_heads % 4 == 0
    assert config.hidden_size % 4 == 0
    if name == "embedded/qwen2":
        assert config.num_key_value_heads == 4 < config.num_attention_heads
        assert config.intermediate_size % 4 == 0
    if name == "embedded/gpt2":
        assert config.n_positions == 512
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_no_dropout(embedded):
    _, _, model, _ = embedded
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {0.0}
    # GPT-2's attention dropout is a number in the configuration; "summary" belongs to a different head.
    settings = model.config.to_dict().items()
    assert {v for k, v in settings if "drop" in k and not k.startswith("summary")} == {0.0}


def test_weights_match_their_summary(embedded):
    _, directory, model, tokenizer = embedded
    summary = json.loads((directory / "pretraining.json").read_text())
    assert sample_loss(model, tokenizer) == pytest.approx(summary["sample_loss"], abs=1e-4)


def test_pretraining_has_taught_more_than_token_frequencies(embedded):
    name, directory, model, tokenizer = embedded
    summary = json.loads((directory / "pretraining.json").read_text())
    assert summary["validation_loss"] < summary["unigram_entropy"] - 1.0
    # The loss on some rows must show it, too.
    total = tokens = 0
    for row in rows("embedded/articles", "validation")[:20]:
        ids = torch.tensor([tokenizer(row["text"], truncation=True, max_length=512)["input_ids"]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert total / tokens < summary["unigram_entropy"] - 1.0, name


def test_generation_ends_at_eos_or_the_token_limit(embedded):
    _, _, model, tokenizer = embedded
    prompt = tokenizer("Return the", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert prompt["input_ids"].shape[1] < out.shape[1] <= prompt["input_ids"].shape[1] + 12
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("text", [SAMPLE, "  two spaces\n\ttab, naïve 日本語 🙂 <x> 12345", "os.path.join(a, *p)"])
def test_decoding_undoes_encoding(embedded, text):
    _, _, _, tokenizer = embedded
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert max(ids) < 2048


def test_special_tokens_are_those_of_the_family(embedded):
    name, _, model, tokenizer = embedded
    expected = {
        "embedded/gpt2": ("<|endoftext|>", None, [2047]),
        "embedded/qwen2": ("<|endoftext|>", "<|endoftext|>", [2045]),
        "embedded/bloom": ("</s>", "<pad>", [2]),
    }[name]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.encode(tokenizer.eos_token)) == expected
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    if name == "embedded/qwen2":
        assert tokenizer.encode("<|im_start|><|im_end|>") == [2046, 2047]


def test_gpt2_small_is_a_configuration_and_a_tokenizer():
    directory = model_directory(CONFIG_ONLY_NAMES[0])
    assert not list(directory.glob("*.safetensors"))
    assert len(AutoTokenizer.from_pretrained(directory)) == 2048
