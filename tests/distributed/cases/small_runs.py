"""Small runs: the settings, models and data that all cases share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.support.models import DROPOUT, MODELS, altered_model, scaled_model, small_model, without_weights
from tutorial_lib.config import Config

STEPS = 4
"""Number of steps, of which the third is measured."""

COMMON: dict[str, Any] = {
    "steps": STEPS,
    "global_batch": 8,
    "seq_length": 64,
    "max_examples": 160,
    "evaluate": False,
    # Some gradients are zero except for rounding (a key's bias shifts all scores equally). Adam divides by their size,
    # so the default of 1e-8 would turn noise into updates of normal size. With 1e-4 they stay tiny.
    "eps": 1e-4,
}


def make_inputs(directory: Path) -> None:
    """Create the models and data that ``tutorial_lib`` does not embed."""
    for name, smaller in MODELS.items():
        small_model(name, directory / name, **smaller)
    for name, rates in DROPOUT.items():
        small_model(name, directory / f"{name}-dropout", **MODELS[name], **rates)
    altered_model("embedded/gpt2", directory / "gpt2-dropout-slow", **DROPOUT["gpt2"])
    without_weights("qwen2", directory / "qwen2-untied", **MODELS["qwen2"], tie_word_embeddings=False)
    without_weights("gpt2", directory / "gpt2-odd", **MODELS["gpt2"], vocab_size=2049)
    scaled_model(directory / "scaled")
    uneven = directory / "uneven"
    uneven.mkdir()
    texts = [("word " * 60 if number % 3 == 0 else "word ") + str(number) for number in range(64)]
    for split in ("train", "validation"):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (uneven / f"{split}.jsonl").write_text(rows)


def config(directory: Path, **flat: Any) -> Config:
    """Return a configuration whose ``model`` and ``dataset`` may be names in ``directory``."""
    flat = COMMON | flat
    for kind in ("model", "dataset"):
        if (directory / str(flat.get(kind))).is_dir():
            flat[kind] = str(directory / flat[kind])
    return Config.create("cpu", **{"storage": str(directory / "runs"), **flat})


def copy_run(before: Config, after: Config) -> Config:
    """Copy the directory of one run to that of another, and return the other run's configuration."""
    shutil.copytree(before.directory, after.directory)
    return after
