"""Models on the meta device, which have structure and shapes but no values, and the files that hold the values.

This is for engines that split a model first and load the pieces afterwards. :func:`tutorial_lib.models.load_model`
returns the same model with its values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from tutorial_lib.config import ConfigError, EngineConfig, ModelConfig
from tutorial_lib.models.loading import (
    fetch,
    is_config_only,
    is_local,
    load_trained_config,
    no_weights_message,
    prepare,
    resolve_model,
    set_activation_checkpointing,
)
from tutorial_lib.models.stored import (
    StoredTensor,
    check_all_used,
    check_complete,
    check_files,
    check_no_integers,
    locate_weights,
    match_tensors,
    persistent_buffers,
    stored_tensors,
)


def model_outline(m: ModelConfig, engine: EngineConfig) -> PreTrainedModel:
    """Build the model of :func:`build_model` on the meta device: structure and shapes, without values or memory.

    Raises:
        ConfigError: as for :func:`build_model`.
    """
    model = _outline(_trained_config(m), m.trust_remote_code)
    model.tie_weights()
    prepare(model, m.freeze)
    if engine.activation_checkpointing:
        set_activation_checkpointing(model, engine.recompute)
    return model


def _trained_config(m: ModelConfig) -> PretrainedConfig:
    return load_trained_config(m.name, random_init=m.random_init, trust_remote_code=m.trust_remote_code)


def _outline(model_config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model on the meta device without tying it: weights are drawn before they are tied."""
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    try:
        with no_init_weights(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config, **options)
    except (KeyError, AttributeError, TypeError, ValueError, AssertionError, ImportError) as error:
        raise ConfigError(
            f"No model can be built from the config.json of this {model_config.model_type} model: "
            f"{type(error).__name__}: {error}. Correct it, or choose another model."
        ) from error


@contextmanager
def drawing_weights(m: ModelConfig, seed: int) -> Iterator[PreTrainedModel]:
    """Yield a model on the meta device, and make the block draw the same random numbers as :func:`load_model`.

    If you initialise its modules in transformers' order, they get the same weights as from :func:`load_model`.
    """
    model = _outline(_trained_config(m), m.trust_remote_code)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        yield model


def check_stored_weights(m: ModelConfig, engine: EngineConfig) -> None:
    """Refuse a directory whose files do not hold the pretrained model's parameters, for any engine.

    Hub models are not checked: they may not be on this machine yet.

    Raises:
        ConfigError: names the file or the parameters, and what to do.
    """
    if not m.random_init and is_local(m.name):
        check_files(resolve_model(m.name))
        _match_stored(m, must_be_read_as_stored=engine.name == "fsdp")


def locate_tensors(m: ModelConfig) -> dict[str, StoredTensor]:
    """Find where each tensor of a pretrained model is stored, and download the files if needed.

    Returns:
        Stored tensors by the names of parameters and persistent buffers. Of tied parameters, one name may be missing;
        a buffer is missing if no file holds it.

    Raises:
        ConfigError: there is no such model, or its files do not hold every parameter in the model's own layout.
    """
    return _match_stored(m, must_be_read_as_stored=True)


def _match_stored(m: ModelConfig, *, must_be_read_as_stored: bool) -> dict[str, StoredTensor]:
    if is_config_only(m.name):
        raise ConfigError(no_weights_message(m.name))
    stored = fetch(_stored, "model", m.name, in_slices=must_be_read_as_stored)
    model = _outline(_trained_config(m), m.trust_remote_code)
    model.tie_weights()
    found, converted, others = match_tensors(model, stored)
    if converted and must_be_read_as_stored:
        raise ConfigError(
            f"engine='fsdp' reads tensors as they are stored, and {converted[0].path} holds {converted[0].name}, which "
            "transformers converts while it loads. Write engine='deepspeed', or save the model in its own layout once: "
            "model.save_pretrained(DIRECTORY, save_original_format=False)."
        )
    if not converted:  # otherwise only transformers knows the result, and it reports problems while loading
        own = dict(model.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(tensor.shape) for name, tensor in (own | persistent_buffers(model)).items()}
        stored_ids = {id(own[name]) for name in own.keys() & found.keys()}
        wrong = {n: (t.shape, shapes[n]) for n, t in found.items() if t.shape != shapes[n]}
        missing = [name for name, parameter in own.items() if id(parameter) not in stored_ids]
        check_all_used(m.name, model, others)
        check_complete(m.name, missing=missing, wrong_shapes=wrong)
        check_no_integers({name: tensor for name, tensor in found.items() if name in own})
    return found


def _stored(target: str, *, local_files_only: bool, in_slices: bool) -> list[StoredTensor]:
    paths = locate_weights(target, local_files_only)
    if not paths:
        raise OSError("it has no weights: neither model.safetensors nor pytorch_model.bin, nor the index of either")
    if in_slices and paths[0].suffix != ".safetensors":
        raise OSError(
            "it has no safetensors file, and engine='fsdp' reads slices of those. Load it once with transformers and "
            "save it with save_pretrained, or write engine='deepspeed'"
        )
    return stored_tensors(paths)
