"""Dimensions of a model, as the planner needs them, read from its Hugging Face configuration.

For an unknown family, the parameters are counted on a model that is built on the meta device, where tensors have shapes
but no memory.
"""

from __future__ import annotations

from typing import Any

from tutorial_lib.config import ConfigError, EngineConfig, ModelConfig
from tutorial_lib.theory.dimensions import Dimensions


def read_config(name: str) -> tuple[Dimensions, int]:
    """Return the dimensions of a Hugging Face model and its number of parameters, counted if the family is unknown.

    Raises:
        ConfigError: there is no such model, or it is not a dense decoder.
    """
    from tutorial_lib.models.loading import load_config

    config = load_config(name)
    if config.is_encoder_decoder:
        raise ConfigError(
            f"{name} is a {config.model_type} model, an encoder with a decoder, but the planner only knows decoders. "
            "Name a causal language model, or write --model-size with the parameters of one."
        )
    config = config.get_text_config()
    if dimensions := from_config(config):
        return dimensions, dimensions.num_params
    from tutorial_lib.models.meta import model_outline

    model = model_outline(ModelConfig(name=name, random_init=True), EngineConfig())
    return measure(model), sum(parameter.numel() for parameter in model.parameters())


def measure(model: Any) -> Dimensions:
    """Measure the dimensions of a decoder that has been built, for example on the meta device.

    Raises:
        ConfigError: the model has experts, or its configuration lacks a dimension that the planner needs.
    """
    config, names = model.config.get_text_config(), [name for name, _ in model.named_parameters()]
    if any(".experts." in name or ".block_sparse_moe." in name for name in names):
        raise ConfigError(
            f"{config.model_type} is a mixture of experts, which the planner does not know. Write --model-size with "
            "the parameters of a dense model."
        )
    try:
        shared = _shared(config)
    except AttributeError as error:
        raise ConfigError(
            f"The configuration of this {config.model_type} model lacks something that the planner needs: {error}. "
            "Write --model-size with --layers, --hidden, --heads and --vocabulary."
        ) from error
    keys = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
    width = next((getattr(config, key) for key in keys if getattr(config, key, None)), None)
    gated = any("gate_proj" in name or "gate_up_proj" in name for name in names)
    separate = any("q_proj" in name for name in names)
    return Dimensions(
        **shared, kv_heads=getattr(config, "num_key_value_heads", None), intermediate=width, gated=gated,
        qkv_bias=any(name.endswith(("q_proj.bias", "query_key_value.bias", "c_attn.bias")) for name in names),
        bias=any(name.endswith(("o_proj.bias", "out_proj.bias", "dense.bias")) for name in names),
        norm_vectors=2 if any("norm" in name and name.endswith(".bias") for name in names) else 1,
        column_layers=(3 if separate else 1) + (2 if gated else 1),
    )  # fmt: skip


def _shared(config: Any) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers, "hidden": config.hidden_size, "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size, "tied": config.tie_word_embeddings,
    }  # fmt: skip


def from_config(config: Any) -> Dimensions | None:
    """Return the dimensions if the family's configuration determines every parameter, otherwise None."""
    family = config.model_type
    if family == "gpt2":
        return Dimensions(
            **_shared(config), positions=config.n_positions, intermediate=config.n_inner, qkv_bias=True, bias=True,
            norm_vectors=2, mlp_tensors=5 if config.activation_function == "gelu_new" else 2,
        )  # fmt: skip
    if family == "bloom":
        return Dimensions(
            **_shared(config), qkv_bias=True, bias=True, norm_vectors=2, embedding_norm=True, fused_attention=False
        )
    plain = getattr(config, "head_dim", None) in (None, config.hidden_size // config.num_attention_heads)
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if family in ("llama", "mistral", "qwen2") and plain and not biased:
        return Dimensions(
            **_shared(config), kv_heads=config.num_key_value_heads, intermediate=config.intermediate_size, gated=True,
            qkv_bias=family == "qwen2", column_layers=5,
        )  # fmt: skip
    return None
