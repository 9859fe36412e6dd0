"""Preflight warnings: parts of a model's configuration that a run does not use, and a trial that was not made."""

from __future__ import annotations

import shutil

import pytest
from transformers import AutoConfig

from tutorial_lib import launch
from tutorial_lib.config import Config
from tutorial_lib.embedded import model_directory
from tutorial_lib.engine import trial_forward

SIZES = {
    "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_local_experts": 4, "vocab_size": 2048,
}  # fmt: skip


def mixtral(directory, engine="torch", **changes):
    """Return a run of a small Mixtral with random weights."""
    model = directory / "model"
    AutoConfig.for_model("mixtral", **SIZES, **changes).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{model_directory('embedded/gpt2')}/{name}", model)
    return Config.create(
        "cpu", model=str(model), random_init=True, engine=engine, dp=1, storage=str(directory), steps=1
    )


@pytest.mark.parametrize(
    ("engine", "asked", "warned"), [("torch", True, True), ("torch", False, False), ("trainer", True, False)]
)
def test_a_routers_loss_that_is_left_out_is_named(tmp_path, caplog, engine, asked, warned):
    launch.preflight(mixtral(tmp_path, engine=engine, output_router_logits=asked))
    assert ("has output_router_logits=true" in caplog.text) is warned


def test_a_model_that_was_not_tried_on_a_tiny_copy_is_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trial_forward, "_LARGEST_COPY", 100)
    launch.preflight(mixtral(tmp_path, initializer_range=0.03))  # a configuration whose trial has not passed before
    assert "of type 'mixtral', could not be tried on a tiny copy: even the copy has 0 million" in caplog.text
