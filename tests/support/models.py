"""Small models: altered copies of the embedded ones, some with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tutorial_lib.embedded import model_directory
from tutorial_lib.models import load_model

LAYERS, HIDDEN = 2, 32
"""Layers and hidden size of the models below, which are enough to test equality to 1e-6."""

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": 4},
    # Pairs of query heads share a key-value head, and four ranks get one of those each.
    "qwen2": {
        "num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS, "hidden_size": HIDDEN,
        "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "bloom": {"n_layer": LAYERS, "hidden_size": HIDDEN, "n_head": 8},
}  # fmt: skip
"""Settings of smaller models with random weights, where they differ from the embedded model of the same name."""

DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1),
    "bloom": dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.1),
}


def small_model(name: str, target: Path, **changes: Any) -> None:
    """Write an altered model with random weights, the same ones each time."""
    without_weights(name, target, **changes)
    load_model(str(target), random_init=True).save_pretrained(target)


def without_weights(name: str, target: Path, **changes: Any) -> None:
    # Large weights make logits distinguish tokens, as in a trained model. With the usual ones, all tokens are about
    # equally likely.
    altered_model(f"embedded/{name}", target, initializer_range=0.2, **changes)
    (target / "model.safetensors").unlink()


def altered_model(name: str, target: Path, **changes: Any) -> None:
    shutil.copytree(model_directory(name), target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def scaled_model(target: Path, scale: float = 0.3) -> None:
    """Write a small Gemma 4 with random weights. It multiplies each layer's output by a stored buffer."""
    without_weights("gpt2", target)
    config = AutoConfig.for_model(
        "gemma4_text", vocab_size=2048, num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=96,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=0,
        layer_types=["full_attention"] * LAYERS, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    config.save_pretrained(target)
    model = load_model(str(target), random_init=True)
    for layer in model.model.layers:
        layer.layer_scalar.fill_(scale)
    model.save_pretrained(target)


def mixture_model(target: Path) -> None:
    """Write a small Mixtral with random weights, whose experts transformers stores one by one."""
    without_weights("gpt2", target)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=2048, num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    config.save_pretrained(target)
    load_model(str(target), random_init=True).save_pretrained(target)
