"""Trial of a model family: forward passes of a tiny copy, before anything starts.

The copy runs the same model code with two layers, narrow widths and random weights. It must meet three requirements
for the batches of :mod:`tutorial_lib.models.masks`: the family accepts the batches of this run, a document gets the
same logits in a shared row as on its own, and no token sees a later one. With ``loss_chunks`` there is a fourth: the
logits are exactly the result of the output layer. And with ``engine="trainer"``, which trains on the loss that the
family's own code computes, that loss must equal the one of :mod:`tutorial_lib.trainer.loss`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.dataloader.collate import Collate
from tutorial_lib.engine.chunked_loss import ChunkedLoss
from tutorial_lib.models.loading import prepare

_LAYERS, _MOST_LAYERS = 2, 8
_HEADS, _WIDTH, _EXPERTS, _VOCABULARY = 4, 64, 16, 96
_ROW = 24  # tokens of a row: two documents and some padding
_WINDOW = 4  # tokens; the copy's window if the model's is shorter than the run's rows, so that it cuts rows, too
_LARGEST_COPY = 30_000_000  # parameters
_TOLERANCE = 1e-3  # for logits around 1; seeing one token more or less changes them by at least 0.01

_SIZES = {
    "intermediate_size": _WIDTH, "ffn_dim": _WIDTH, "n_inner": _WIDTH, "ffn_hidden_size": _WIDTH, "dff": _WIDTH,
    "moe_intermediate_size": _WIDTH, "shared_expert_intermediate_size": _WIDTH, "vocab_size": _VOCABULARY,
    "num_experts": _EXPERTS, "num_local_experts": _EXPERTS, "n_routed_experts": _EXPERTS, "decoder_layers": _LAYERS,
    "decoder_vocab_size": _VOCABULARY, "chunk_size": _ROW, "mamba_chunk_size": _ROW,
    "vocab_size_per_layer_input": _VOCABULARY, "linear_num_key_heads": _HEADS, "linear_num_value_heads": _HEADS,
    "linear_num_heads": _HEADS, "q_lora_rank": _WIDTH, "index_n_heads": _HEADS, "dim_ff": _WIDTH,
}  # fmt: skip
"""Names of sizes in configurations, and the largest value of each in a copy."""

_PASSED: set[tuple[Any, ...]] = set()
"""Trials that passed in this process, so that many runs of one model pay only once."""

_MAMBA_HEADS = {"num_heads": "head_dim", "mamba_n_heads": "mamba_d_head", "n_mamba_heads": "mamba_headdim"}
"""Settings for the number of Mamba 2's heads, each with the setting for the width of a head.

All heads together are ``expand`` times as wide as the model."""

_GROUPS = ("num_key_value_heads", "num_kv_heads")
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def trial_forward(config: Config, model_config: PretrainedConfig) -> str | None:
    """Refuse a model that cannot be trained on the requested batches, at the cost of a few tiny forward passes.

    No random state changes, and nothing as large as the real model is allocated.

    Args:
        config: what to run; only its model, engine, batching, ``seq_length``, ``loss_chunks`` and ``tp`` matter.
        model_config: configuration of the model.

    Returns:
        A sentence that says why no trial could be made, or None.

    Raises:
        ConfigError: names the family, the setting and the reason, and what to write instead.
    """
    _check_is_language_model(config.model.name, model_config)
    asked = config.data.batching
    chunked, own_loss = config.engine.loss_chunks > 1, config.engine.name == "trainer"
    tp, length = config.parallel.tp, config.data.seq_length
    tried = (type(model_config), model_config.to_json_string(), asked, length, tp, chunked, own_loss)
    if tried in _PASSED:
        return None
    model = f"The model {config.model.name!r}, of type {model_config.model_type!r}"
    try:
        tiny = TinyCopy.of(config, model_config)
    except NoCopyError as error:
        return (
            f"{model}, could not be tried on a tiny copy: {error}. So only training will show whether it suits "
            f"batching={asked!r}."
        )
    for batching in dict.fromkeys(("longest", asked)):
        problem = tiny.problem(batching)
        if problem is None:
            continue
        if batching != "longest":
            advice = "Write batching='longest'"
        elif getattr(model_config, "is_decoder", None) is False:
            advice = 'Set "is_decoder": true in its config.json if it is meant to be causal, or choose another model'
        else:
            advice = "Choose another model"
        raise ConfigError(
            f"{model}, cannot be trained with batching={asked!r}: {problem} {advice}. (Found with a tiny copy of the "
            "model.)"
        )
    if own_loss and (problem := tiny.loss_problem()):
        raise ConfigError(
            f"{model}, cannot be trained with engine='trainer', which uses the loss of the model's own code: {problem} "
            "Write engine='deepspeed' or 'fsdp', which compute the loss from the logits. (Found with a tiny copy of "
            "the model.)"
        )
    if chunked and (problem := tiny.output_problem()):
        raise ConfigError(
            f"{model}, cannot be trained with loss_chunks={config.engine.loss_chunks}: {problem} Leave loss_chunks "
            "out. (Found with a tiny copy of the model.)"
        )
    _PASSED.add(tried)
    return None


def _check_is_language_model(name: str, model_config: PretrainedConfig) -> None:
    kind = model_config.model_type
    ships_code = "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not ships_code:
        raise ConfigError(
            f"The model {name!r} is of type {kind!r}, for which transformers has no causal language "
            "model. Choose a model that predicts the next token, such as a GPT-2, Llama or Qwen2."
        )


# ------------------------------------------------------------------------------------------------------ the tiny copy


def _narrow(config: PretrainedConfig, tp: int, *, fewer_heads: bool) -> None:
    """Narrow a configuration in place: fewer columns, and fewer heads, which ``tp`` divides. Heads keep their width.

    Args:
        config: the configuration.
        tp: tensor-parallel size.
        fewer_heads: whether to reduce the number of heads, too. If not, their width must not depend on the model's.
    """
    text: Any = config.get_text_config()
    if fewer_heads:
        _narrow_heads(text, tp)
    else:
        text.hidden_size = _WIDTH
    expand = getattr(text, "mamba_expand", getattr(text, "expand", None))
    for heads, width in _MAMBA_HEADS.items():
        if all(isinstance(getattr(text, name, None), int) for name in (heads, width)) and expand:
            setattr(text, heads, int(expand * text.hidden_size) // getattr(text, width))
            for groups in ("n_groups", "mamba_n_groups", "mamba_ngroups"):
                if hasattr(text, groups):
                    setattr(text, groups, 1)
    for name, most in _SIZES.items():
        size = getattr(text, name, None)
        if isinstance(size, int):
            setattr(text, name, min(size, most))
        elif isinstance(size, list):  # one for each layer
            setattr(text, name, [min(each, most) for each in size[: text.num_hidden_layers]])


def _narrow_heads(text: Any, tp: int) -> None:
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads > 0:
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        fewer = tp * -(-_HEADS // tp)
        text.num_attention_heads, text.hidden_size = fewer, fewer * head
        for name in _GROUPS:
            groups = getattr(text, name, None)
            if isinstance(groups, int):
                setattr(text, name, fewer if groups == heads else max(tp, fewer * groups // heads))
    else:
        text.hidden_size = _WIDTH


def _shorten(config: PretrainedConfig, seq_length: int) -> None:
    """Cut a configuration in place: at most 8 layers, one of each type if they fit, and a small vocabulary.

    Some models contain submodels for other kinds of input. Those get a single layer.
    """
    text: Any = config.get_text_config()
    for name in config.sub_configs:
        part = getattr(config, name, None)
        for depth in ("num_hidden_layers", "encoder_layers", "num_layers"):
            if part not in (None, text) and isinstance(getattr(part, depth, None), int):
                setattr(part, depth, 1)
    types: Sequence[str] = getattr(text, "layer_types", None) or ()
    first_of_each = [types.index(each) for each in dict.fromkeys(types)]
    layers = min(max(_LAYERS, *(first + 1 for first in first_of_each), 0), _MOST_LAYERS)
    if types:
        with suppress(AttributeError):  # some families compute it
            text.layer_types = list(types[:layers])
    if mlp_types := getattr(text, "mlp_layer_types", None):
        text.mlp_layer_types = list(mlp_types[:layers])
    text.num_hidden_layers = layers
    if getattr(text, "num_kv_shared_layers", None):
        text.num_kv_shared_layers = 0
    text.vocab_size = _VOCABULARY
    for owner in {id(each): each for each in (config, text)}.values():
        for name in _TOKEN_IDS:
            if getattr(owner, name, None) is not None:
                setattr(owner, name, 0)
        for name in _WINDOWS:
            window = getattr(owner, name, None)
            if isinstance(window, int) and 0 < window < seq_length:
                setattr(owner, name, _WINDOW)


class NoCopyError(Exception):
    """A family has no small copy that works. The message says why."""


def _build(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model with random weights, unless it is too large for a trial."""
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the same copy on every rank; torch.manual_seed would seed GPUs, too
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
        if (size := sum(parameter.numel() for parameter in outline.parameters())) > _LARGEST_COPY:
            raise NoCopyError(f"even the copy has {size / 1e6:,.0f} million parameters")
        with torch.device("cpu"):
            model = AutoModelForCausalLM.from_config(config, **options)
    # With the usual small initial weights, a token hardly reacts to any other token.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return prepare(model.eval(), ())


# ---------------------------------------------------------------------------------------------------- the requirements


@dataclass(frozen=True)
class TinyCopy:
    """A tiny model of the same family, and two documents to run through it in batches like those of the run."""

    model: Any
    row: int

    @classmethod
    def of(cls, config: Config, model_config: PretrainedConfig) -> TinyCopy:
        """Build a copy that works.

        Raises:
            ConfigError: no copy works, for a reason that has nothing to do with sizes.
            NoCopyError: no small copy works.
        """
        seq_length = config.data.seq_length
        failed: Exception | None = None
        reasons = []
        for fewer_heads in (True, False, None):
            tiny = copy.deepcopy(model_config)
            try:
                _shorten(tiny, seq_length)
                if fewer_heads is not None:
                    _narrow(tiny, config.parallel.tp, fewer_heads=fewer_heads)
                built = cls(_build(tiny, config.model.trust_remote_code), min(_ROW, seq_length))
            except NoCopyError as error:
                reasons.append(str(error))
                continue
            except Exception as error:  # a family's code may raise anything if sizes do not fit together
                reasons.append(_failure(error).rstrip("."))
                continue
            try:
                built.forward({"input_ids": torch.ones(1, built.row, dtype=torch.int64)})
            except Exception as error:
                reasons.append(_failure(error).rstrip("."))
                failed = error if isinstance(error, TypeError | AttributeError) else failed
                continue
            return built
        if failed:
            raise ConfigError(
                f"The model {config.model.name!r}, of type {model_config.model_type!r}, cannot be trained: "
                f"{_failure(failed)} Look for a missing value in its config.json, or choose another model: this "
                "package calls model(input_ids=..., attention_mask=..., position_ids=..., use_cache=False).logits. "
                "(Found with a tiny copy of the model.)"
            )
        raise NoCopyError(reasons[0])

    def problem(self, batching: str) -> str | None:
        """Return how the family breaks a requirement, or None."""
        first, second = self.documents()
        changed = first.copy()
        changed[-1] = changed[-1] % (_VOCABULARY - 1) + 1
        try:
            together = self._logits([first, second], batching)
            with_another_end = self._logits([changed, second], batching)
            alone = [self._logits([document], "longest")[0] for document in (first, second)]
        except Exception as error:  # whatever a family's code raises
            return _failure(error)
        if not all(logits.isfinite().all() for logits in together):
            return "its logits are NaN or infinite: look for such a value in its config.json."
        if differ(with_another_end[0][:-1], together[0][:-1]):
            return "it is not causal: a token sees the tokens after it, so there is nothing left to predict."
        if any(map(differ, together, alone)):
            return "a document's logits depend on its row, so it sees other documents or padding, or misses tokens."
        return None

    def loss_problem(self) -> str | None:
        """Return how the loss of the family's own code differs from the mean over a step's tokens, or None.

        The Trainer passes the step's number of tokens, over all micro-batches. Twice that number must halve the loss. A
        term that does not depend on the number, such as a router's loss, may be added.
        """
        if not getattr(self.model, "accepts_loss_kwargs", True):
            return "it ignores num_items_in_batch, the number of tokens of a step."
        if self.model.loss_type is None:
            self.model.loss_type = "ForCausalLM"  # the default, which transformers would otherwise warn about
        batch = self.batch(self.documents(), "longest")
        labels_NS = batch["labels"][:, 1:]
        logits_NSV = self.forward({name: each for name, each in batch.items() if name != "labels"})[:, :-1]
        loss_sum = F.cross_entropy(logits_NSV.flatten(0, 1), labels_NS.flatten(), reduction="sum")
        number = int((labels_NS != -100).sum())
        try:
            with torch.no_grad():
                once, half = (
                    self.model(**batch, num_items_in_batch=torch.tensor(n), use_cache=False).loss
                    for n in (number, 2 * number)
                )
        except Exception as error:  # whatever a family's code raises
            return _failure(error)
        if once is None:
            return "it returns no loss."
        if not torch.isclose(once - half, loss_sum / (2 * number), rtol=_TOLERANCE):
            return (
                "it is not the mean over the next tokens of all micro-batches of a step. It may predict other tokens, "
                "or ignore num_items_in_batch."
            )
        return None

    def output_problem(self) -> str | None:
        """Return why the loss cannot be computed inside the output layer, or None. Do not use the copy afterwards."""
        ids = torch.arange(1, self.row + 1)[None] * 7 % (_VOCABULARY - 1) + 1
        logits_NV = self.forward({"input_ids": ids})[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits_NV, ids[:, 1:].flatten(), reduction="sum")
        try:
            with ChunkedLoss(self.model, 4).with_labels(ids):
                loss = self.forward({"input_ids": ids})
        except (ConfigError, RuntimeError, NotImplementedError, AttributeError) as error:
            return f"it has no plain output layer ({str(error).partition(chr(10))[0].rstrip('.')})."
        if loss.dim() > 0 or not torch.isclose(loss, expected, rtol=_TOLERANCE):
            return "it changes its output layer's result before returning it as logits."
        return None

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            logits_BSV: torch.Tensor = self.model(**batch, use_cache=False).logits
        return logits_BSV

    def documents(self) -> list[Any]:
        """Return the tokens of two documents that leave some room in a row."""
        ids = np.arange(1, self.row + 1, dtype=np.int32) * 7 % (_VOCABULARY - 1) + 1
        half, third = max(self.row // 2, 1), max(self.row // 3, 1)
        return [ids[:half], ids[half : half + third]]

    def batch(self, documents: list[Any], batching: str) -> dict[str, torch.Tensor]:
        """Return one batch with all documents."""
        collate = Collate(seq_length=self.row, batching=batching, micro_batch=len(documents), pad_token_id=0)
        examples = [(document, 1) for document in documents]
        (batch,) = collate([examples] if batching == "packed" else [[example] for example in examples])
        return batch

    def _logits(self, documents: list[Any], batching: str) -> list[torch.Tensor]:
        """Return the logits of each document, from one batch with all of them."""
        batch = self.batch(documents, batching)
        del batch["labels"]
        logits_BSV = self.forward(batch)
        lengths = [len(document) for document in documents]
        if batching == "packed":
            return list(logits_BSV[0, : sum(lengths)].split(lengths))
        return [row[:length] for row, length in zip(logits_BSV, lengths, strict=True)]


def _failure(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return f"its code fails with {type(error).__name__}: {reason}."


def differ(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether logits differ by more than rounding errors."""
    scale = max([1.0, *right.abs().flatten().tolist()])
    return not torch.allclose(left, right, atol=_TOLERANCE * scale, rtol=0)
