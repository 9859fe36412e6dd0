"""Tied embeddings: whether a model's output layer shares the input embedding's weight, decided once for all engines.

``config.json`` says whether it does (``tie_word_embeddings``), but is sometimes wrong: the files hold an output weight
that differs from the embedding. transformers then unties the two, except at ZeRO stage 3. Here the files always win,
and the configuration is corrected before any engine builds the model from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from tutorial_lib.models.stored import load_pickled, locate_weights

_ROWS = 4096
"""Number of rows to compare at once, so that neither embedding is ever read in full."""


def resolve_tying(target: str, *, local_files_only: bool, model_config: PretrainedConfig) -> PretrainedConfig:
    """Return a pretrained model's configuration, untied if its files hold two different weights.

    Args:
        target: hub name or directory, as ``from_pretrained`` takes it.
        local_files_only: do not contact the hub.
        model_config: from ``config.json``; changed in place.

    Raises:
        ConfigError: a pickled file holds more than tensors.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    pairs = getattr(model_class, "_tied_weights_keys", None)
    if not getattr(model_config, "tie_word_embeddings", False) or not isinstance(pairs, dict):
        return model_config
    try:
        with _stored_weights(target, local_files_only, _name_mapper(model_class, model_config)) as stored:
            differing = any(
                one in stored and other in stored and not _equal(stored[one], stored[other])
                for one, other in pairs.items()
            )
    except SafetensorError:
        return model_config  # loading the weights will say what is wrong with the file
    if differing:
        _set_tied(model_config, False)
    return model_config


def record_tying(model: PreTrainedModel) -> None:
    """Correct a model's configuration if its weights are not tied, so that the saved configuration is right."""
    if getattr(model.config, "tie_word_embeddings", False):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if any(parameters.get(one) is not parameters.get(other) for one, other in pairs):
            _set_tied(model.config, False)


def _set_tied(model_config: PretrainedConfig, tied: bool) -> None:
    for each in (model_config, model_config.get_text_config()):
        each.tie_word_embeddings = tied


def _name_mapper(model_class: Any, model_config: PretrainedConfig) -> Callable[[str], str]:
    """Return a function that maps a tensor's name in a file to its name in the model."""
    conversions = get_checkpoint_conversion_mapping(model_config.model_type) or []
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    prefix = f"{model_class.base_model_prefix}."
    with_prefix = {name for pair in model_class._tied_weights_keys.items() for name in pair if name.startswith(prefix)}

    def name_in_model(name: str) -> str:
        for each in renamings:
            name, _ = each.rename_source_key(name)
        # A base model is saved without the prefix that the model with a head has.
        return prefix + name if prefix + name in with_prefix else name

    return name_in_model


@contextmanager
def _stored_weights(
    target: str, local_files_only: bool, name_in_model: Callable[[str], str]
) -> Iterator[dict[str, Any]]:
    """Open a model's files, and yield their tensors by name in the model, to be read slice by slice."""
    with ExitStack() as stack:
        stored: dict[str, Any] = {}
        for path in locate_weights(target, local_files_only):
            if path.suffix == ".safetensors":
                file = stack.enter_context(safe_open(path, "pt"))
                stored |= {name_in_model(name): file.get_slice(name) for name in file.keys()}
            else:
                stored |= {name_in_model(name): tensor for name, tensor in load_pickled(path, "cpu").items()}
        yield stored


def _equal(one: Any, other: Any) -> bool:
    shape, other_shape = (tuple(getattr(each, "get_shape", lambda each=each: each.shape)()) for each in (one, other))
    if shape != other_shape:
        return False
    return all(one[i : i + _ROWS].equal(other[i : i + _ROWS]) for i in range(0, shape[0], _ROWS))
