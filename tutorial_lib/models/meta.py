"""A model before it has values: its code and shapes on the meta device, and where the values are to come from.

For engines that split a model first and fill the pieces afterwards. :func:`tutorial_lib.models.load_model` gives the
same model with its values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from tutorial_lib.config import Config, ConfigError, ModelConfig
from tutorial_lib.embedded import CONFIG_ONLY_NAMES
from tutorial_lib.models.loading import fetch, load_trained_config, no_weights, prepare, set_activation_checkpointing


def model_outline(config: Config) -> PreTrainedModel:
    """The model of :func:`build_model` on the meta device: its code and shapes, without values or memory.

    Raises:
        ConfigError: as :func:`build_model`.
    """
    m = config.model
    model = _outline(_trained_config(m), m.trust_remote_code)
    model.tie_weights()
    prepare(model, m.freeze)
    if config.engine.activation_checkpointing:
        set_activation_checkpointing(model)
    return model


def _trained_config(m: ModelConfig) -> PretrainedConfig:
    return load_trained_config(m.name, random_init=m.random_init, trust_remote_code=m.trust_remote_code)


def _outline(model_config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """On the meta device, and not tied: while weights are drawn, tied ones are still two."""
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    with no_init_weights(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, **options)


@contextmanager
def drawing_weights(config: Config) -> Iterator[PreTrainedModel]:
    """A model on the meta device and, while the block runs, the random numbers that :func:`load_model` draws from.

    Whoever initialises its modules in transformers' order gets the weights of :func:`load_model`.
    """
    m = config.model
    model = _outline(_trained_config(m), m.trust_remote_code)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(config.run.seed)
        yield model


def weight_files(name: str) -> dict[str, str]:
    """Which safetensors file holds each of a model's tensors, by the tensor's name there. Fetches them if need be.

    Raises:
        ConfigError: there is no such model, or it has no safetensors files.
    """
    if name in CONFIG_ONLY_NAMES:
        raise ConfigError(no_weights(name))

    def locate(target: str, *, local_files_only: bool) -> dict[str, str]:
        options: dict[str, Any] = {
            "local_files_only": local_files_only, "_raise_exceptions_for_missing_entries": False
        }  # fmt: skip
        if single := cached_file(target, "model.safetensors", **options):
            with safe_open(single, "pt") as file:
                return dict.fromkeys(file.keys(), single)
        index = cached_file(target, "model.safetensors.index.json", **options)
        if index is None:
            raise OSError(
                "it has no safetensors file. Load it once with transformers and save_pretrained it, or write "
                "random_init=True"
            )
        paths, _ = get_checkpoint_shard_files(target, index, local_files_only=local_files_only)
        by_name = {Path(path).name: path for path in paths}
        return {key: by_name[file] for key, file in json.loads(Path(index).read_text())["weight_map"].items()}

    return dict(fetch(locate, "model", name))
