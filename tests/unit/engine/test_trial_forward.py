"""Trial: a tiny copy of a model shows before a start whether its family can be trained on the requested batches."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoConfig, modeling_utils

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.dataloader.collate import Collate
from tutorial_lib.embedded import MODEL_NAMES
from tutorial_lib.engine.trial_forward import trial_forward
from tutorial_lib.models import load_config, masks

WINDOWED = {
    "mistral": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64},
    "qwen2": {
        "sliding_window": 64, "use_sliding_window": True, "num_hidden_layers": 4,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
    },
}  # fmt: skip


def trial(model_config, batching, seq_length=128, **flat):
    config = Config.create(model=model_config.model_type, batching=batching, seq_length=seq_length, **flat)
    return trial_forward(config, model_config)


@pytest.mark.parametrize("batching", ["max_length", "longest", "packed"])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_embedded_models_take_every_batching(name, batching):
    for seq_length in (2, 3, 128):
        trial(load_config(name), batching, seq_length)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox", *WINDOWED])
def test_other_families_take_packed_batches(family):
    trial(AutoConfig.for_model(family, **WINDOWED.get(family, {})), "packed")


@pytest.mark.parametrize("family", WINDOWED)
def test_without_our_patch_packed_batches_lose_sliding_windows(family, monkeypatch):
    monkeypatch.setattr(masks, "window_of", lambda model: None)
    model_config = AutoConfig.for_model(family, **WINDOWED[family])
    trial(model_config, "longest")
    trial(model_config, "packed", seq_length=64)
    with pytest.raises(ConfigError, match=r"misses tokens\. Write batching='longest'"):
        trial(model_config, "packed", seq_length=65)


@pytest.mark.parametrize("batching", ["longest", "packed"])
@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_family_that_sees_the_future_is_refused(family, batching):
    with pytest.raises(ConfigError, match=f"of type '{family}'.*batching='{batching}': it is not causal.*is_decoder"):
        trial(AutoConfig.for_model(family), batching)
    trial(AutoConfig.for_model(family, is_decoder=True), "longest")


def test_a_family_that_takes_no_document_mask_is_refused_with_what_to_write():
    for model_config in (AutoConfig.for_model("falcon", alibi=True), AutoConfig.for_model("mamba")):
        trial(model_config, "longest")
        with pytest.raises(ConfigError, match=r"'packed': its code fails with \w+Error: .*Write batching='longest'"):
            trial(model_config, "packed")


def test_attention_between_documents_is_detected(monkeypatch):
    together = Collate.__call__

    def leaking(self, examples):
        batches = together(self, examples)
        for batch in batches:
            if self.batching == "packed":
                batch["attention_mask"] = torch.ones_like(batch["attention_mask"]).tril()
        return batches

    monkeypatch.setattr(Collate, "__call__", leaking)
    with pytest.raises(ConfigError, match="sees other documents"):
        trial(load_config("embedded/gpt2"), "packed", seq_length=100)  # a length whose trial has not passed before


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "bloom", "llama", "gpt_neox", "mixtral", "gemma3_text"])
def test_families_whose_loss_can_be_computed_in_chunks(family):
    trial(AutoConfig.for_model(family), "longest", loss_chunks=8)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.0625}),
    ],
)
def test_a_family_that_changes_its_logits_is_refused_with_loss_chunks(family, changes):
    """Without the refusal, it would silently be trained on a different loss."""
    model_config = AutoConfig.for_model(family, **changes)
    trial(model_config, "longest")
    with pytest.raises(ConfigError, match=f"type '{family}'.*loss_chunks=8: it changes its .*Leave loss_chunks out"):
        trial(model_config, "longest", loss_chunks=8)


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(ConfigError, match=r"its logits are NaN or infinite: look .* config\.json"):
        trial(AutoConfig.for_model("gpt2", layer_norm_epsilon=float("nan")), "longest")


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ConfigError, match="of type 't5', for which transformers has no causal language model"):
        trial(AutoConfig.for_model("t5"), "longest")


def test_a_trial_changes_neither_random_states_nor_the_configuration():
    model_config = AutoConfig.for_model("mistral")
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), model_config.to_dict()
    trial(model_config, "packed")
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), model_config.to_dict()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v4", r"even the copy has [\d,]+ million parameters"),
        ("xmod", "its code fails with ValueError: Input language unknown"),
    ],
)
def test_a_model_that_cannot_be_shrunk_is_not_refused_but_named(family, reason):
    said = trial(AutoConfig.for_model(family), "packed")
    assert re.search(f"of type '{family}', could not be tried on a tiny copy: {reason}", said)
    assert "only training will show whether it suits batching='packed'" in said


def test_a_family_with_a_part_for_images_gets_a_trial():
    for family in ("gemma3", "got_ocr2"):
        assert trial(AutoConfig.for_model(family), "packed") is None


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "deepseek_v32"])
def test_families_whose_heads_or_sizes_have_rules_of_their_own_get_a_trial(family):
    assert trial(AutoConfig.for_model(family), "packed") is None


@pytest.mark.parametrize("family", ["granitemoehybrid", "bamba", "qwen3_next", "qwen3_5_text"])
def test_the_state_of_recurrent_layers_crosses_the_documents_of_a_packed_row(family):
    assert trial(AutoConfig.for_model(family), "longest") is None
    with pytest.raises(ConfigError, match=r"'packed': a document's logits depend on its row.*batching='longest'"):
        trial(AutoConfig.for_model(family), "packed")


def test_code_that_fails_whatever_the_sizes_is_refused():
    with pytest.raises(ConfigError, match=r"fails with TypeError: topk\(\): .*Look for a missing value in its config"):
        trial(AutoConfig.for_model("deepseek_v2", num_experts_per_tok=None), "packed")


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "bloom", "llama", "mixtral", "gpt_neox", "mamba"])
def test_families_whose_own_loss_is_the_one_of_a_steps_tokens(family):
    trial(AutoConfig.for_model(family), "longest", engine="trainer")


def test_the_trial_of_a_loss_passes_on_no_warning_of_transformers(monkeypatch):
    """It warns about every family whose class it lists no loss for, such as GPT-2, and then uses the default."""
    warnings: list[str] = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", warnings.append)
    trial(AutoConfig.for_model("gpt2", n_inner=77), "longest", engine="trainer")
    assert not warnings


def test_a_term_for_the_router_may_be_added_to_the_loss():
    trial(AutoConfig.for_model("mixtral", output_router_logits=True), "longest", engine="trainer")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bart", {}),  # its labels are the current tokens, not the next ones
        ("blenderbot", {}),
        ("pegasus", {}),
        ("marian", {"decoder_vocab_size": 58101}),
    ],
)
def test_a_family_with_another_loss_is_refused_for_the_trainer_alone(family, changes):
    model_config = AutoConfig.for_model(family, **changes)
    trial(model_config, "longest")
    with pytest.raises(ConfigError, match=f"type '{family}'.*engine='trainer'.*: it is not the mean over the next tok"):
        trial(model_config, "longest", engine="trainer")
