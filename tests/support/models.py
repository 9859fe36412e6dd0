"""Small models: altered copies of the embedded ones, some with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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
