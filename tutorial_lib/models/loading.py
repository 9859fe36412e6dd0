"""Model and tokenizer from a hub name, a directory, or the embedded default: one code path for all three.

Every model takes the same batch, padded or packed, so that nothing after this module asks for a model's family:

| key | padded | packed |
| --- | --- | --- |
| ``input_ids`` | [B, S] int64 | [B, S] int64 |
| ``attention_mask`` | [B, S] int64, 0 on padding | [B, 1, S, S] bool: may query i (row) look at key j (column)? |
| ``position_ids`` | left out | [B, S] int64, from 0 again at every document |

B is the batch size, S the sequence length. A packed mask is causal and blocked at document borders. Models with
PyTorch's fused attention ("sdpa": GPT-2, Qwen2 and most others) take it as it is. BLOOM does not: its attention *adds*
the mask to the scores, and its ALiBi bias wants the distance between tokens, which it derives from a padding mask and
not from ``position_ids``. :func:`load_model` teaches such models both (see ``_accept_document_masks``).
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.embedded import CONFIG_ONLY_NAMES, MODEL_NAMES, model_directory
from tutorial_lib.models.tying import record_tying, resolve_tying


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    random_init: bool = False,
    seed: int = 0,
    freeze: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model that takes the batches described above and keeps no generation cache.

    Within a stage-3 ``HfDeepSpeedConfig`` the parameters are partitioned as they are made, here as everywhere in
    transformers. Of pretrained weights, rank 0 reads the files and hands out each tensor.

    Args:
        name: hub name, directory, or a name of :data:`tutorial_lib.embedded.MODEL_NAMES`.
        dtype: type of the parameters.
        random_init: weights drawn from the configuration's distribution instead of pretrained ones. One seed gives
            the same weights on every device, with and without partitioning.
        seed: of the random weights.
        freeze: patterns (``fnmatch``) of parameter names that get no gradient.
        trust_remote_code: run Python code that the hub model ships with.

    Raises:
        ConfigError: there is no such model, it has no weights, or a pattern matches nothing.
    """
    if name in CONFIG_ONLY_NAMES and not random_init:
        raise ConfigError(no_weights(name))
    config = load_trained_config(name, random_init=random_init, trust_remote_code=trust_remote_code)
    if random_init:
        model = _random_model(config, dtype, seed, trust_remote_code)
    else:
        model = fetch(
            AutoModelForCausalLM.from_pretrained, "model", name, config=config, dtype=dtype,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    return prepare(model, freeze)


def no_weights(name: str) -> str:
    """What to say of a model that is a configuration alone."""
    return (
        f"{name} is a configuration without weights. Write random_init=True to start from random ones, or choose "
        f"a pretrained model: {', '.join(MODEL_NAMES)}."
    )


def prepare(model: PreTrainedModel, freeze: Sequence[str]) -> PreTrainedModel:
    """Have a model take the batches described above and keep no cache, and freeze parameters by name patterns."""
    model.config.use_cache = False
    record_tying(model)
    _accept_document_masks(model)
    freeze_parameters(model, freeze)
    return model


def build_model(config: Config) -> PreTrainedModel:
    """The model of a run: loaded or drawn, frozen and set to recompute activations as its configuration says.

    Raises:
        ConfigError: as :func:`load_model`, or the model cannot recompute activations.
    """
    model = load_model(
        config.model.name,
        random_init=config.model.random_init,
        seed=config.run.seed,
        freeze=config.model.freeze,
        trust_remote_code=config.model.trust_remote_code,
    )
    if config.engine.activation_checkpointing:
        set_activation_checkpointing(model)
    return model


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token and padding on the right.

    GPT-2's tokenizer has no pad token; its EOS token then pads. So an id does not tell padding from a real end of
    text: only ``attention_mask`` does.

    Raises:
        ConfigError: there is no such tokenizer, or it has neither a pad nor an EOS token.
    """
    tokenizer = fetch(AutoTokenizer.from_pretrained, "tokenizer", name, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token is None:
        raise ConfigError(f"The tokenizer of {name!r} has no EOS token, which ends every document here.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Some families pad on the left, for generation. Training reads a row from its first position on.
    tokenizer.padding_side = "right"
    return tokenizer


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model: its dimensions, without weights.

    Raises:
        ConfigError: there is no such model.
    """
    return fetch(AutoConfig.from_pretrained, "model", name, trust_remote_code=trust_remote_code)


def load_trained_config(name: str, *, random_init: bool = False, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the configuration of a model as it is trained: tied only if its weights are (see :mod:`.tying`).

    Raises:
        ConfigError: there is no such model.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    return config if random_init else fetch(resolve_tying, "model", name, model_config=config)


def resolve_model(name: str) -> str:
    """What ``from_pretrained`` is given: the directory of an embedded model, anything else as it is.

    Raises:
        ConfigError: ``name`` starts with ``embedded/`` but there is no such model.
    """
    return str(model_directory(name)) if name.startswith("embedded/") else name


@functools.cache
def hub_reachable() -> bool:
    """Whether the model hub answers at all; asked once, for at most 5 seconds, and not if HF_HUB_OFFLINE is set.

    Without this question every load of an unknown name retries for minutes on a machine without internet.
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
    """``load`` a model or tokenizer by name, with one error message for all that can be wrong with a name.

    Args:
        load: is given what the name stands for, ``local_files_only`` and the options.
        what: ``model`` or ``tokenizer``, for the message.

    Raises:
        ConfigError: there is no such thing.
    """
    local = name.startswith("embedded/") or Path(name).is_dir()
    if not local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ConfigError(f"The {what} {name!r} is no directory here, and no hub name. {_ADVICE}")
    target = resolve_model(name)
    reachable = local or hub_reachable()
    try:
        with _quiet(name in MODEL_NAMES):
            return load(target, local_files_only=not reachable, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        if not options.get("trust_remote_code") and "trust_remote_code" in str(error):
            raise ConfigError(
                f"The {what} {name!r} ships Python code of its own, which is not run unasked. Read it, and if you "
                "trust it, write trust_remote_code=True."
            ) from error
        if local:
            raise ConfigError(f"The directory {name!r} does not hold a usable {what}: {reason}") from error
        hub = (
            f"the hub did not give it ({reason})" if reachable
            else "the hub could not be reached, and the hub's local cache does not have it"
        )  # fmt: skip
        near = difflib.get_close_matches(name, MODEL_NAMES, n=1, cutoff=0.8)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"The {what} {name!r} is neither a directory nor embedded, and {hub}.{hint} {_ADVICE}"
        ) from error


@contextmanager
def _quiet(tiny: bool) -> Iterator[None]:
    """No progress bar for a model that loads in a moment."""
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
    """Draw weights in transformers' order and from its distributions, so that partitioning changes no number."""
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with torch.random.fork_rng(), _DrawOnHost():
        if is_deepspeed_zero3_enabled():
            # Constructors draw nothing here: transformers partitions first, then initialises layer by layer.
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, **options)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, **options)
        torch.manual_seed(seed)
        model.initialize_weights()
        model.tie_weights()
        return model


class _DrawOnHost(TorchFunctionMode):
    """Draw random weights with the host's generator, whose numbers do not depend on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_) and args[0].device.type not in ("cpu", "meta"):
            drawn = func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
            return args[0].copy_(drawn)
        return func(*args, **kwargs)


# --------------------------------------------------------------------------------------------- document masks


def _accept_document_masks(model: PreTrainedModel) -> None:
    """Let a model whose attention adds its mask take a boolean [B, 1, S, S] mask, ALiBi included.

    A row of a packed mask says how many keys a token sees, itself included: one less is its position within its
    document. ALiBi built from these positions is the one that the document has when it is alone. (Positions counted
    over the whole row would give the same attention, as softmax ignores a constant per document, but with rounding
    errors that grow with the row.)
    """
    if model.config._attn_implementation == "sdpa":
        return
    inner: Any = model.base_model
    inner.register_forward_pre_hook(_boolean_mask_to_bias, with_kwargs=True)
    if hasattr(inner, "build_alibi_tensor"):
        inner.build_alibi_tensor = types.MethodType(_build_alibi, inner)


def slice_alibi(model: PreTrainedModel, tp: int, tp_rank: int) -> None:
    """Have a model with ALiBi give the biases of one tensor-parallel rank's heads. Does nothing to other models.

    A head's slope depends on its number among all heads. A model that is told of its own share of heads alone would
    give the first rank's slopes, or none of a larger model's, to every rank, and nothing would say so.

    Args:
        model: as :func:`load_model` gives it; its attention layers may have been split already.
        tp: tensor-parallel size.
        tp_rank: whose heads: the ``tp_rank``-th share of them.
    """
    inner: Any = model.base_model
    if hasattr(inner, "build_alibi_tensor"):
        heads = int(model.config.num_attention_heads)
        inner.num_heads = heads
        build = functools.partial(_build_alibi, inner)

        def build_share(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
            whole = build(attention_mask, num_heads, dtype).unflatten(0, (-1, heads))
            return whole.tensor_split(tp, dim=1)[tp_rank].flatten(0, 1)

        inner.build_alibi_tensor = build_share


def _boolean_mask_to_bias(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 4 and mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=module.dtype, device=mask.device)
        kwargs["attention_mask"] = bias.masked_fill_(~mask, torch.finfo(module.dtype).min)
    return args, kwargs


def _build_alibi(self: Any, attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """BLOOM's builder for a padding mask [B, S]; for a document mask [B, 1, S, S], the same from its positions."""
    build = functools.partial(type(self).build_alibi_tensor, self, num_heads=num_heads, dtype=dtype)
    if attention_mask.dim() != 4:
        return build(attention_mask)
    batch_size, _, _, length = attention_mask.shape
    positions_BS = (attention_mask[:, 0] == 0).sum(-1).sub(1).clamp(min=0)
    # For an unpadded row of the same length the builder gives slope * 0, 1, 2, ...: a table to look positions up in.
    table_HS = build(attention_mask.new_ones(1, length, dtype=torch.int64))[:, 0]
    return table_HS[:, positions_BS].transpose(0, 1).reshape(batch_size * num_heads, 1, length)


# ------------------------------------------------------------------------------------- freezing and dimensions


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Take parameters out of training. Returns the names of those now frozen.

    Tied weights are one parameter under several names: any of them freezes it, under all of them.

    Args:
        patterns: as in ``fnmatch``: ``*`` matches any characters, dots included.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = fnmatch.filter(named, pattern)
        if not matched:
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:3]
            raise ConfigError(f"freeze: no parameter matches {pattern!r}. Near names: {', '.join(near)}.")
        for name in matched:
            named[name].requires_grad_(False)
    frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
    if patterns and len(frozen) == len(named):
        raise ConfigError(f"freeze: {', '.join(patterns)} leaves no parameter to train.")
    return frozen


def set_activation_checkpointing(model: PreTrainedModel) -> None:
    """Keep only each layer's input, and recompute its activations in backward.

    Raises:
        ConfigError: the model's code has no such mode.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"activation_checkpointing: {error} Write activation_checkpointing=False.") from error


def max_sequence_length(model_config: PretrainedConfig) -> int | None:
    """The longest sequence that a model has positions for, or None where positions are relative (BLOOM's ALiBi)."""
    found = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def check_sequence_length(seq_length: int, model_config: PretrainedConfig) -> None:
    """Refuse rows that are longer than the model has positions for.

    Raises:
        ConfigError: ``seq_length`` exceeds the model's limit.
    """
    limit = max_sequence_length(model_config)
    if limit is not None and seq_length > limit:
        raise ConfigError(
            f"seq_length={seq_length} is longer than this {model_config.model_type} model's {limit} positions. "
            f"Write seq_length={limit} or less."
        )


def check_tensor_parallel(tp: int, model_config: PretrainedConfig) -> None:
    """Refuse a tensor-parallel size that would not give every rank the same share of every layer.

    Each rank computes whole attention heads, so ``tp`` must divide the query and the key-value heads; it must divide
    the width of the MLP; and the vocabulary where the output layer has weights of its own. Tied embeddings stay whole.

    Args:
        tp: tensor-parallel size.
        model_config: the model's dimensions.

    Raises:
        ConfigError: names what ``tp`` does not divide, and the sizes that would do.
    """
    if tp == 1:
        return
    text: Any = model_config.get_text_config()
    heads = int(text.num_attention_heads)
    sizes = {
        "attention heads": heads,
        "key-value heads": int(getattr(text, "num_key_value_heads", None) or heads),
        # GPT-2 and BLOOM: four times the hidden size, unless stated.
        "columns of each MLP": int(
            getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
        ),
    }
    if not getattr(text, "tie_word_embeddings", True):
        sizes["entries of the vocabulary"] = int(text.vocab_size)
    problems = [f"{size} {what}" for what, size in sizes.items() if size % tp]
    if problems:
        common = math.gcd(*sizes.values())
        fitting = [size for size in range(1, common + 1) if common % size == 0]
        raise ConfigError(
            f"tp={tp} does not divide this {text.model_type} model's {' nor its '.join(problems)}. "
            f"Write tp as one of {fitting}, or choose another model."
        )


def count_parameters(model_config: PretrainedConfig) -> int:
    """How many parameters a model of these dimensions has, tied ones counted once. Allocates no memory."""
    with torch.device("meta"):
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
        # The class itself, where transformers has one: from_config would partition under a stage-3 configuration.
        model = model_class(model_config) if model_class else AutoModelForCausalLM.from_config(model_config)
    return sum(parameter.numel() for parameter in model.parameters())
