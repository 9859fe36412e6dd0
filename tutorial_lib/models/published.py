"""Published models without their weights: real dimensions, random weights, nothing to download.

``published/bloom-560m`` is a directory that is written on first use: the published ``config.json`` with the tokenizer
of the embedded model of the same family, whose ids all fit into the published vocabulary. Use it to measure memory and
speed at real sizes; its weights are random, so its predictions mean nothing.

Sources: the ``config.json`` of bigscience/bloom-560m, openai-community/gpt2, openai-community/gpt2-medium and
Qwen/Qwen2.5-0.5B on the Hugging Face Hub. The parameter counts come from the weight files on their model cards.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutorial_lib.config import ConfigError
from tutorial_lib.embedded import cache_directory, model_directory

PREFIX = "published/"


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """Dimensions of a published model.

    Attributes:
        family: the embedded model that provides the tokenizer.
        num_parameters: number of parameters, with tied ones counted once.
        values: entries of its ``config.json`` that differ from the embedded model's.
    """

    family: str
    num_parameters: int
    values: dict[str, Any]


_GPT2: dict[str, Any] = {
    "n_positions": 1024, "vocab_size": 50257, "initializer_range": 0.02,
    "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1,
}  # fmt: skip

PUBLISHED: dict[str, PublishedModel] = {
    "bloom-560m": PublishedModel(
        "embedded/bloom",
        559_214_592,
        {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250_880, "initializer_range": 0.02},
    ),
    "gpt2": PublishedModel("embedded/gpt2", 124_439_808, {**_GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12}),
    "gpt2-medium": PublishedModel("embedded/gpt2", 354_823_168, {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "qwen2.5-0.5b": PublishedModel(
        "embedded/qwen2",
        494_032_768,
        {
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "max_position_embeddings": 32_768, "max_window_layers": 24,
            "layer_types": ["full_attention"] * 24, "vocab_size": 151_936, "initializer_range": 0.02,
            "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
        },
    ),
}  # fmt: skip
"""Published models by name, without the :data:`PREFIX`."""


def published_directory(name: str) -> Path:
    """Return the directory of a published model, with its ``config.json`` and a tokenizer; write it if needed.

    Args:
        name: with or without :data:`PREFIX`.

    Raises:
        ConfigError: this package has no dimensions for this model.
    """
    bare = name.removeprefix(PREFIX)
    if bare not in PUBLISHED:
        near = difflib.get_close_matches(bare, PUBLISHED, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"This package has no dimensions for a model {bare!r}.{hint} Write one of: {', '.join(PUBLISHED)}."
        )
    model = PUBLISHED[bare]
    source = model_directory(model.family)
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | model.values
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    tokenizer = sorted(source.glob("tokenizer*.json"))
    digest = hashlib.sha256(b"\0".join([text.encode(), *(path.read_bytes() for path in tokenizer)])).hexdigest()[:12]
    target = cache_directory() / f"published-{digest}" / bare
    if not target.is_dir():
        _write(target, text, tokenizer)
    return target


def _write(target: Path, config: str, tokenizer: list[Path]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            (scratch / "config.json").write_text(config, encoding="utf-8")
            for path in tokenizer:
                shutil.copy(path, scratch)
            scratch.chmod(0o755)  # mkdtemp makes a private directory; the cache may be shared between users
            if not target.is_dir():
                scratch.replace(target)
        except OSError:
            if not target.is_dir():  # otherwise another process has already written it
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"{target} could not be written: {error}. Set TUTORIAL_LIB_CACHE to a directory that can be written to."
        ) from error
