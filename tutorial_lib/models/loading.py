"""Loading of models and tokenizers from a hub name, a directory, or the embedded default: one code path for all three.

Every model takes the same batches, padded or packed: see :mod:`tutorial_lib.models.masks`.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.embedded import CONFIG_ONLY_NAMES, MODEL_NAMES, model_directory
from tutorial_lib.models.directory import check_config, check_generation_config, check_tokenizer_files
from tutorial_lib.models.masks import accept_document_masks
from tutorial_lib.models.published import PREFIX, published_directory
from tutorial_lib.models.recompute import keep_slow_results
from tutorial_lib.models.stored import check_all_used, check_complete, check_files, check_pickles
from tutorial_lib.models.tying import record_tying, resolve_tying


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    random_init: bool = False,
    seed: int = 0,
    freeze: Sequence[str] = (),
    trust_remote_code: bool = False,
    num_shards: int = 1,
) -> PreTrainedModel:
    """Load a causal language model with its pretrained weights, or with random ones.

    The model accepts this package's batches, and its generation cache is off. While a stage-3 ``HfDeepSpeedConfig`` is
    alive, transformers partitions parameters as soon as they are created; rank 0 then reads the pretrained weights and
    broadcasts each tensor.

    Args:
        name: hub name, directory, a name of :data:`tutorial_lib.embedded.MODEL_NAMES`, or ``published/NAME``.
        dtype: type of the parameters.
        random_init: draw weights from the configuration's distribution instead of loading pretrained ones. The same
            seed gives the same weights on every device, with and without partitioning.
        seed: seed of the random weights.
        freeze: name patterns (``fnmatch``) of parameters that get no gradient.
        trust_remote_code: run the Python code that the model ships with.
        num_shards: ranks over which transformers splits pretrained weights while reading them (FSDP2). Collective if
            greater than 1.

    Raises:
        ConfigError: there is no such model, it has no weights, or a pattern of ``freeze`` matches nothing.
    """
    if is_config_only(name) and not random_init:
        raise ConfigError(no_weights_message(name))
    config = load_trained_config(name, random_init=random_init, trust_remote_code=trust_remote_code)
    if random_init:
        model = _random_model(config, dtype, seed, trust_remote_code)
    else:
        if is_local(name):
            check_files(resolve_model(name))
            check_generation_config(resolve_model(name))
        split = {"distributed_config": DistributedConfig(fsdp_size=num_shards)} if num_shards > 1 else {}
        model = fetch(
            _load_pretrained, "model", name, called=name, config=config, dtype=dtype,
            trust_remote_code=trust_remote_code, **split,
        )  # fmt: skip
    return prepare(model, freeze)


def _load_pretrained(target: str, *, called: str, **options: Any) -> PreTrainedModel:
    """Load a model, and refuse files that lack parameters: transformers would only log that it draws them at random."""
    check_pickles(target, options["local_files_only"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        target, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, info = loaded
    own = dict(model.named_parameters(remove_duplicate=False))
    check_all_used(called, model, info["unexpected_keys"])
    check_complete(
        called,
        missing=info["missing_keys"] & own.keys(),
        wrong_shapes={key: (stored, expected) for key, stored, expected in info["mismatched_keys"]},
    )
    return model


def no_weights_message(name: str) -> str:
    """Return the message for a model without weights: what to write instead."""
    return (
        f"{name} is a configuration without weights. Write random_init=True to start from random ones, or choose "
        f"a pretrained model: {', '.join(MODEL_NAMES)}."
    )


def prepare(model: PreTrainedModel, freeze: Sequence[str]) -> PreTrainedModel:
    """Make a model accept our batches, turn its generation cache off, and freeze parameters by name patterns."""
    model.config.use_cache = False
    record_tying(model)
    accept_document_masks(model)
    freeze_parameters(model, freeze)
    return model


def build_model(config: Config) -> PreTrainedModel:
    """Build the model of a run, with frozen parameters and activation checkpointing as configured.

    Raises:
        ConfigError: as for :func:`load_model`, or the model cannot recompute activations.
    """
    model = load_model(
        config.model.name,
        random_init=config.model.random_init,
        seed=config.run.seed,
        freeze=config.model.freeze,
        trust_remote_code=config.model.trust_remote_code,
        num_shards=config.parallel.dp if config.engine.shard_at_load else 1,
    )
    if config.engine.activation_checkpointing:
        set_activation_checkpointing(model, config.engine.recompute)
    return model


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with a pad token and padding on the right.

    GPT-2's tokenizer has no pad token, so its EOS token pads. An id alone then cannot tell padding from a real end of
    text; only ``attention_mask`` can.

    Raises:
        ConfigError: there is no such tokenizer, or it has no EOS token, or no tokens besides the special ones.
    """
    if is_local(name):
        check_tokenizer_files(resolve_model(name))
    tokenizer = fetch(AutoTokenizer.from_pretrained, "tokenizer", name, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"The tokenizer of {name!r} has no EOS token to end a document with. Write the one of its vocabulary into "
            'its tokenizer_config.json, such as "eos_token": "</s>", or choose another model.'
        )
    if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}:
        raise ConfigError(
            f"The tokenizer of {name!r} has no tokens except {', '.join(map(repr, tokenizer.all_special_tokens))}: its "
            "vocabulary is missing. Add the model's tokenizer.json, or choose another model."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Some families pad on the left, for generation. In training, every row starts at its first position.
    tokenizer.padding_side = "right"
    return tokenizer


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration of a model: its dimensions, without weights.

    Raises:
        ConfigError: there is no such model.
    """
    if is_local(name):
        check_config(resolve_model(name))
    return fetch(AutoConfig.from_pretrained, "model", name, trust_remote_code=trust_remote_code)


def load_trained_config(name: str, *, random_init: bool = False, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return a model's configuration as it will be trained: tied only if its weights are (see :mod:`.tying`).

    Raises:
        ConfigError: there is no such model, or it is quantized.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    if random_init:
        return config
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"The model {name!r} is quantized (quantization_config in its config.json), which is for inference only. "
            "Write the name of the original model, or random_init=True."
        )
    return fetch(resolve_tying, "model", name, model_config=config)


def is_local(name: str) -> bool:
    """Return whether a model's name refers to a local directory rather than a hub model."""
    return name.startswith(("embedded/", PREFIX)) or Path(name).is_dir()


def is_config_only(name: str) -> bool:
    """Return whether a model's name refers to dimensions and a tokenizer without weights."""
    return name in CONFIG_ONLY_NAMES or name.startswith(PREFIX)


def resolve_model(name: str) -> str:
    """Return the argument for ``from_pretrained``: an embedded or published model's directory, or the name unchanged.

    Raises:
        ConfigError: ``name`` starts with ``embedded/`` or ``published/`` but there is no such model.
    """
    if name.startswith(PREFIX):
        return str(published_directory(name))
    return str(model_directory(name)) if name.startswith("embedded/") else name


@functools.cache
def hub_reachable() -> bool:
    """Return whether the model hub answers. Ask once, for at most 5 seconds, and not at all if HF_HUB_OFFLINE is set.

    Without this check, loading an unknown name on a machine without internet retries for minutes.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the HTTP library's own error types differ between its versions
        return False
    return True


def fetch(load: Callable[..., Any], what: str, name: str, **options: Any) -> Any:
    """Call ``load`` for a model or tokenizer by name, and turn every problem with the name into a ``ConfigError``.

    Other errors pass through: for example, one of DeepSpeed's checks fails while a stage-3 model loads, a library is
    not installed, or memory runs out.

    Args:
        load: called with the resolved name, ``local_files_only`` and the options.
        what: ``model`` or ``tokenizer``, for the message.
        name: the name as the user wrote it.

    Raises:
        ConfigError: there is no such model or tokenizer, or its files cannot be used.
    """
    local = is_local(name)
    if not local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ConfigError(f"The {what} {name!r} is neither a local directory nor a hub name. {_ADVICE}")
    target = resolve_model(name)
    if local and Path(target, "adapter_config.json").is_file():
        raise ConfigError(
            f"The directory {name!r} holds an adapter (adapter_config.json), but this package trains full models. "
            "Merge it once (peft: merge_and_unload, then save_pretrained), or write the directory of its base model."
        )
    reachable = local or hub_reachable()
    try:
        with _quiet(name in MODEL_NAMES):
            return load(target, local_files_only=not reachable, **options)
    except (OSError, ValueError, StrictDataclassError) as error:
        if isinstance(error, ConfigError) or not _concerns_files(error, target):
            raise
        reason = str(error).strip().partition("\n")[0].rstrip()
        if reason.endswith(":"):  # the reason is on the next lines
            reason = " ".join(str(error).split())
        if not options.get("trust_remote_code") and "trust_remote_code" in str(error):
            raise ConfigError(
                f"The {what} {name!r} ships its own Python code, which only runs with your consent. Read it and, if "
                "you trust it, write trust_remote_code=True."
            ) from error
        if local:
            raise ConfigError(f"The directory {name!r} does not hold a usable {what}: {reason}") from error
        hub = (
            f"the hub did not provide it ({reason})" if reachable
            else "the hub could not be reached, and the hub's local cache does not have it"
        )  # fmt: skip
        near = difflib.get_close_matches(name, MODEL_NAMES, n=1, cutoff=0.8)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"The {what} {name!r} is neither a directory nor embedded, and {hub}.{hint} {_ADVICE}"
        ) from error


def _concerns_files(error: Exception, target: str) -> bool:
    """Return whether an error is about the model's files: missing, unreadable or of an unknown kind."""
    if isinstance(error, OSError):
        # An OSError that transformers raises has no errno; one from the operating system has the file's name.
        return error.errno is None or str(error.filename).startswith(target)
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return not any(f"/{library}/" in raised_in for library in ("deepspeed", "pydantic", "torch"))


@contextmanager
def _quiet(tiny: bool) -> Iterator[None]:
    """Hide the progress bar of a model that loads in an instant."""
    hide = tiny and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()


_ADVICE = f"Write a hub name, a directory, or an embedded model: {', '.join(MODEL_NAMES)}."


# ---------------------------------------------------------------------------------------------- random weights


def _random_model(config: PretrainedConfig, dtype: torch.dtype, seed: int, trust_remote_code: bool) -> PreTrainedModel:
    """Draw weights in transformers' order and from its distributions, so that partitioning does not change them."""
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with torch.random.fork_rng(), _DrawOnHost():
        if is_deepspeed_zero3_enabled():
            # Constructors draw nothing: transformers partitions first, then initialises layer by layer.
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, **options)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, **options)
        torch.manual_seed(seed)
        model.initialize_weights()
        model.tie_weights()
        return model


class _DrawOnHost(TorchFunctionMode):
    """Draws random weights with the CPU's generator, so that they do not depend on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_) and args[0].device.type not in ("cpu", "meta"):
            drawn = func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
            return args[0].copy_(drawn)
        return func(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------- freezing


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze parameters by name patterns, and return the names of the frozen ones.

    Tied weights are one parameter with several names: matching any of its names freezes it under all of them.

    Args:
        model: the model to change.
        patterns: as in ``fnmatch``: ``*`` matches any characters, dots included.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = fnmatch.filter(named, pattern)
        if not matched:
            near = [*difflib.get_close_matches(pattern, named, n=3, cutoff=0.3), *named]
            some = ", ".join([*dict.fromkeys(near)][:3])
            raise ConfigError(f"freeze: no parameter matches {pattern!r}. Some of the model's names: {some}.")
        for name in matched:
            named[name].requires_grad_(False)
    frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
    if patterns and len(frozen) == len(named):
        raise ConfigError(f"freeze: {', '.join(patterns)} leaves no parameter to train.")
    return frozen


def set_activation_checkpointing(model: PreTrainedModel, recompute: str = "full") -> None:
    """Make a model recompute its layers' activations in backward.

    Args:
        model: the model.
        recompute: ``full`` keeps only each layer's input; ``selective`` also keeps results that are slow to
            recompute (:mod:`tutorial_lib.models.recompute`).

    Raises:
        ConfigError: the model does not support it.
    """
    more = {"context_fn": keep_slow_results} if recompute == "selective" else {}
    try:
        model.activation_checkpointing_enable({"use_reentrant": False, **more})
    except ValueError as error:
        raise ConfigError(f"activation_checkpointing: {error} Write activation_checkpointing=False.") from error
