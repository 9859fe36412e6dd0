"""Dimensions of the model to plan: a public model by name or size, a Hugging Face configuration, or just a size.

Public models need neither the network nor PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tutorial_lib.config import ConfigError
from tutorial_lib.theory.dimensions import Dimensions, derive
from tutorial_lib.theory.known_models import HUB_NAMES, MODELS, nearest_model

SEQ_LENGTH = 2048
"""Default number of tokens per sequence."""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """The model to plan.

    Args:
        dimensions: its own dimensions, or derived ones.
        num_params: number of parameters.
        source: origin of the dimensions, in words.
        name: its name for ``train``.
        random_init: whether it has no weights, so that ``train`` needs ``--random-init``.
    """

    dimensions: Dimensions
    num_params: int
    source: str
    name: str
    random_init: bool = False

    def default_seq_length(self) -> int:
        """Return :data:`SEQ_LENGTH`, or the number of learned positions if that is smaller."""
        return min(SEQ_LENGTH, self.dimensions.positions or SEQ_LENGTH)


def find_model(
    name: str | None, size: float | None, given: dict[str, int | None], seq_length: int | None = None
) -> FoundModel:
    """Find the model to plan by its name or its size.

    Args:
        name: name of a public model, a hub name, a directory or embedded/...
        size: number of parameters; a public model within 5 % of this size is used, unless dimensions are given.
        given: ``layers``, ``hidden``, ``heads`` and ``vocabulary``, or None for those that are not given.
        seq_length: tokens per sequence, if given; a public model with fewer positions is not chosen by size.

    Raises:
        ConfigError: neither or both of name and size are given, or no model has these dimensions.
    """
    if (name is None) == (size is None):
        raise ConfigError("Write either --model NAME or --model-size PARAMETERS, such as --model-size 7e9.")
    stated = [flag for flag, value in given.items() if value is not None]
    if name is not None:
        if stated:
            raise ConfigError(f"--{stated[0]} goes with --model-size; {name} has its own dimensions.")
        if name in MODELS:
            return _public(name, name)
        return _from_hugging_face(name)
    assert size is not None
    near = None if stated else nearest_model(size)
    if near and not (seq_length or 0) > MODELS[near].positions > 0:
        return _public(near, f"{near}'s, the public model of about this size")
    try:
        dimensions = derive(size, **given)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    source = "as given" if len(stated) == len(given) else "assumed, following GPT-3's and LLaMA's sizes"
    return FoundModel(dimensions, int(size), source, "MODEL")


def _public(name: str, source: str) -> FoundModel:
    return FoundModel(MODELS[name], MODELS[name].num_params, source, HUB_NAMES[name])


def _from_hugging_face(name: str) -> FoundModel:
    from tutorial_lib.models.dimensions import read_config
    from tutorial_lib.models.loading import is_config_only, load_config

    dimensions, num_params = read_config(name)
    dimensions = replace(dimensions, tp_engines=tp_engines(load_config(name)))
    return FoundModel(dimensions, num_params, name, name, random_init=is_config_only(name))


def tp_engines(model_config: Any) -> tuple[str, ...]:
    """Return the engines that split the layers of a model, given its Hugging Face configuration."""
    from tutorial_lib.engine.deepspeed.config import why_unsplit
    from tutorial_lib.engine.fsdp.tensor_parallel import FAMILIES

    splits = {"deepspeed": not why_unsplit(model_config), "fsdp": model_config.model_type in FAMILIES}
    return tuple(engine for engine, can_split in splits.items() if can_split)
