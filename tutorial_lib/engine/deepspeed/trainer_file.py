"""DeepSpeed JSON files for the Hugging Face Trainer, which fills in ``"auto"`` values by itself.

The Trainer takes most of them from its ``TrainingArguments``, and three from the model's hidden size. It only replaces
``"auto"``, and never adds a missing key: DeepSpeed's default applies there, and may contradict the run's settings. So
the file must have every key that has to agree with the run, as a value or as ``"auto"``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tutorial_lib.config import ConfigError
from tutorial_lib.engine.deepspeed.file import find, read_json

FILLED = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps", "optimizer.params.weight_decay",
    "fp16.enabled", "bf16.enabled", "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_param_persistence_threshold",
})  # fmt: skip
"""Keys that the Trainer fills in if they are ``"auto"``."""

NEEDED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization.stage",
)  # fmt: skip
"""Keys that the file must have, because DeepSpeed's default does not match the run."""


def check(name: str) -> None:
    """Refuse a file that the Trainer would leave incomplete.

    Args:
        name: a file that :func:`tutorial_lib.engine.deepspeed.file.read` accepts.

    Raises:
        ConfigError: names the keys, and what to write.
    """
    given = read_json(name)
    unknown = [key for key in auto_keys(given) if key not in FILLED]
    if unknown:
        raise ConfigError(
            f'{name}: {", ".join(unknown)} is "auto", which the Hugging Face Trainer does not fill in. Write a value, '
            "or leave it out."
        )
    for key in NEEDED:
        if find(given, key) is None:
            values = '"auto"' if key in FILLED else "0, 1, 2 or 3"
            raise ConfigError(
                f'{name}: {key} is missing. The Hugging Face Trainer fills in "auto" values, but leaves missing keys '
                f"to DeepSpeed's defaults, which do not follow this run. Write {key} as {values}."
            )


def for_trainer(name: str) -> dict[str, Any]:
    """Return a file's content for the Trainer: everything except the ``optimizer`` section.

    That section's values have become settings of the run. Left in, it would make DeepSpeed build its FusedAdam, which
    has to be compiled. PyTorch's AdamW does the same job, or DeepSpeed's CPU Adam if the optimizer is offloaded.
    """
    given = read_json(name)
    given.pop("optimizer", None)
    return given


def auto_keys(given: dict[str, Any], section: str = "") -> Iterator[str]:
    """Yield the dotted keys whose value is ``"auto"``."""
    for key, value in given.items():
        if value == "auto":
            yield section + key
        elif isinstance(value, dict):
            yield from auto_keys(value, f"{section}{key}.")
