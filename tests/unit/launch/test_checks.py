"""Preflight warnings: parts of a model's configuration that a run does not use."""

from __future__ import annotations

import shutil

import pytest
from transformers import AutoConfig

from tutorial_lib import launch
from tutorial_lib.config import Config
from tutorial_lib.embedded import model_directory

SIZES = {
    "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_local_experts": 4, "vocab_size": 2048,
}  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "asked", "warned"), [("torch", True, True), ("torch", False, False), ("trainer", True, False)]
)
def test_a_routers_loss_that_is_left_out_is_named(tmp_path, caplog, engine, asked, warned):
    model = tmp_path / "model"
    AutoConfig.for_model("mixtral", **SIZES, output_router_logits=asked).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{model_directory('embedded/gpt2')}/{name}", model)
    config = Config.create(
        "cpu", model=str(model), random_init=True, engine=engine, dp=1, storage=str(tmp_path), steps=1
    )
    launch.preflight(config)
    assert ("has output_router_logits=true" in caplog.text) is warned
