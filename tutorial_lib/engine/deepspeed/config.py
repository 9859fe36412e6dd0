"""DeepSpeed configuration: built from a :class:`Config` and, if there is one, a user's JSON file.

DeepSpeed's defaults for gradient clipping, pinned memory and the persistence threshold change results or memory, so
all three are always set explicitly.

This module does not import DeepSpeed: a configuration can be built and checked before any engine starts.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
from typing import Any

from tutorial_lib.config import Config, ConfigError, EngineConfig, ParallelConfig, settings
from tutorial_lib.config.checks import check_used
from tutorial_lib.engine.deepspeed import file, trainer_file
from tutorial_lib.engine.deepspeed.file import find
from tutorial_lib.engine.deepspeed.run_checks import check_for_run

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def build(config: Config) -> dict[str, Any]:
    """Build the DeepSpeed configuration of a run: the dictionary that ``deepspeed.initialize`` takes.

    Values in ``config.engine.deepspeed_file`` take precedence; missing and ``"auto"`` values come from the run.

    Raises:
        ConfigError: the file does not parse, holds unknown or misplaced keys, or contradicts the run's batch sizes or
            ``tp``.
    """
    own = _from_config(config)
    if config.engine.deepspeed_file is None:
        return own
    given = file.read(config.engine.deepspeed_file)
    given.pop("optimizer", None)
    merged = _fill(given, own)
    for key in _BATCH_KEYS:
        if merged[key] != own[key]:
            raise ConfigError(
                f"{config.engine.deepspeed_file}: {key} is {merged[key]}, but global_batch={config.run.global_batch}, "
                f"dp={config.parallel.dp} and micro_batch={config.micro_batch} make it {own[key]}. "
                f'Write "auto" in the file, or change the run\'s batch sizes.'
            )
    size = merged.get("tensor_parallel", {}).get("autotp_size", 1)
    if size != config.parallel.tp:
        raise ConfigError(
            f"{config.engine.deepspeed_file}: tensor_parallel.autotp_size is {size}, but tp={config.parallel.tp}. "
            f"Write tp={size}, or remove autotp_size from the file."
        )
    return merged


def check_autotp(engine: EngineConfig, parallel: ParallelConfig, model_config: Any) -> None:
    """Refuse a model or setup that DeepSpeed's automatic tensor parallelism (AutoTP) cannot handle.

    Args:
        engine: gives the ZeRO stage and the precision.
        parallel: gives the tensor-parallel size.
        model_config: the model's configuration, as transformers gives it.

    Raises:
        ConfigError: AutoTP has no plan for the architecture; or the run uses stage 3 before DeepSpeed 0.19.4, or stage
            0 in 16 bits.
    """
    if parallel.tp == 1:
        return
    if engine.zero_stage == 0 and engine.precision != "fp32":
        raise ConfigError(
            f"zero_stage=0 with tp={parallel.tp} and precision={engine.precision!r}: DeepSpeed's 16-bit "
            "optimizer without ZeRO only counts one rank's gradients, and would clip by a norm that is too small. "
            "Write zero_stage=1, or precision='fp32'."
        )
    if engine.zero_stage == 3:
        version = importlib.metadata.version("deepspeed")
        if _release(version) < AUTOTP_STAGE_3_SINCE:
            since = ".".join(map(str, AUTOTP_STAGE_3_SINCE))
            raise ConfigError(
                f"zero_stage=3 with tp={parallel.tp} needs DeepSpeed {since}, and {version} is installed. "
                "Write zero_stage=2 or less, or update DeepSpeed."
            )
    if why := why_unsplit(model_config):
        raise ConfigError(
            f"AutoTP does not split {model_config.get_text_config().model_type}, a model {why}. Write tp=1, or choose "
            "a model that it splits: embedded/qwen2, embedded/bloom, or another family with a plan for linear layers, "
            "such as Llama."
        )


def why_unsplit(model_config: Any) -> str:
    """Return why AutoTP does not split a model's layers, or an empty string if it does."""
    text = model_config.get_text_config()
    styles = set((getattr(text, "base_model_tp_plan", None) or {}).values())
    if text.model_type in AUTOTP_PRESETS or (styles and styles <= _AUTOTP_STYLES):
        return ""
    if text.model_type == "gpt2":
        return "whose Conv1D layers keep their weights transposed"
    return f"with {sorted(styles - _AUTOTP_STYLES)} in its plan" if styles else "without a tensor-parallel plan"


def add_plan(settings: dict[str, Any], model_config: Any) -> None:
    """Name DeepSpeed's own plan in the settings, for a model without one in transformers."""
    preset = AUTOTP_PRESETS.get(model_config.get_text_config().model_type)
    if preset and "partition_config" not in settings["tensor_parallel"]:
        settings["tensor_parallel"].setdefault("preset_model", preset)


AUTOTP_STAGE_3_SINCE = (0, 19, 4)
"""First DeepSpeed version that accepts stage 3 with AutoTP; 0.19.3 still refuses."""

AUTOTP_PRESETS = {"bloom": "bloom"}
"""DeepSpeed's own plans, by model type, for families that have none in transformers."""

_AUTOTP_STYLES = frozenset(
    {"colwise", "rowwise", "colwise_rep", "colwise_gather_output", "replicated_with_grad_allreduce"}
)


def _release(version: str) -> tuple[int, ...]:
    """Parse ``0.19.8+cpu`` into ``(0, 19, 8)``."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d", version)[0].split("."))  # type: ignore[index]


def apply_file(config: Config) -> Config:
    """Apply the values of a DeepSpeed file to the configuration, so that records show what really ran.

    Settings that the file leaves out or sets to ``"auto"`` stay unchanged.

    Raises:
        ConfigError: as for :func:`build`; the file contradicts a setting that was given; or the values cannot run.
    """
    name = config.engine.deepspeed_file
    if name is None:
        return config
    given = file.read(name)
    stated = _stated_settings(given, config.engine, name)
    now = config.flat()
    for setting, (key, value) in stated.items():
        if setting in config.given and now[setting] != value:
            raise ConfigError(
                f"{name}: {key} is {json.dumps(find(given, key))}, which makes {setting}={value!r}, but "
                f"{setting}={now[setting]!r} was given. Leave one of them out."
            )
    try:
        resolved = config.replaced(**{setting: value for setting, (_, value) in stated.items()})
    except ConfigError as error:
        from_file = [f"{setting} is {key}" for setting, (key, _) in stated.items() if setting in str(error)]
        where = f" From the file: {', '.join(from_file)}." if from_file else ""
        raise ConfigError(f"{name}: {error}{where}") from error
    check_used(resolved, {setting: settings()[setting] for setting in config.given}, is_resolved=True)
    check_for_run(given, resolved.engine, resolved.run, source=name)
    build(resolved)
    if config.engine.name == "trainer":
        trainer_file.check(name)
    return resolved


def _stated_settings(given: dict[str, Any], engine: EngineConfig, name: str) -> dict[str, tuple[str, Any]]:
    """Return the settings that a file states, each with its key in the file and its value, by flat name."""
    keys = {
        "zero_stage": "zero_optimization.stage",
        "bucket_size": "zero_optimization.reduce_bucket_size",
        "persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
        "gradient_clipping": "gradient_clipping",
        "learning_rate": "optimizer.params.lr",
        "eps": "optimizer.params.eps",
        "weight_decay": "optimizer.params.weight_decay",
    }
    stated = {setting: (key, find(given, key)) for setting, key in keys.items() if find(given, key) is not None}
    for setting in ("gradient_clipping", "learning_rate", "eps", "weight_decay"):
        if setting in stated:
            stated[setting] = (keys[setting], float(stated[setting][1]))
    for flag, value in zip(("beta1", "beta2"), _betas(given, name), strict=False):
        stated[flag] = ("optimizer.params.betas", value)
    return stated | _stated_offload(given, engine, name) | _stated_precision(given, engine)


def _betas(given: dict[str, Any], name: str) -> list[float]:
    kind = find(given, "optimizer.type", "AdamW")  # a missing or "auto" type means the run's AdamW
    if str(kind).lower() not in ("adam", "adamw"):
        raise ConfigError(
            f'{name}: optimizer.type is {json.dumps(kind)}, but this package trains with AdamW. Write "AdamW", or '
            "remove the section."
        )
    betas = find(given, "optimizer.params.betas", [])
    if betas == []:
        return []
    if not (isinstance(betas, list) and len(betas) == 2 and all(type(beta) in (int, float) for beta in betas)):
        raise ConfigError(
            f"{name}: optimizer.params.betas is {json.dumps(betas)}; write two numbers, such as [0.9, 0.999]."
        )
    return [float(beta) for beta in betas]


def _stated_offload(given: dict[str, Any], engine: EngineConfig, name: str) -> dict[str, tuple[str, Any]]:
    now = engine.offload
    devices = {"param": "cpu" if now == "all" else "none", "optimizer": "none" if now == "none" else "cpu"}
    keys: list[str] = []
    pins: dict[str, bool] = {}
    for part in devices:
        key = f"zero_optimization.offload_{part}"
        section = find(given, key, {})
        if section is None or "device" in section:
            devices[part] = section["device"] if section else "none"
            keys.append(key)
        if section and section.get("pin_memory") is not None:
            pins[f"{key}.pin_memory"] = section["pin_memory"]
        if devices[part] not in ("none", "cpu"):
            raise ConfigError(
                f'{name}: {key}.device is {json.dumps(devices[part])}; this package offloads to "cpu" or "none".'
            )
    if devices["param"] == "cpu" and devices["optimizer"] != "cpu":
        raise ConfigError(
            f"{name}: zero_optimization.offload_param without offload_optimizer is a combination that this package "
            "does not run. Add zero_optimization.offload_optimizer, or remove offload_param."
        )
    stated: dict[str, tuple[str, Any]] = {}
    if keys:
        offload = "all" if devices["param"] == "cpu" else "optimizer" if devices["optimizer"] == "cpu" else "none"
        stated["offload"] = (keys[-1], offload)
    if pins and "cpu" in devices.values():
        stated["pin_memory"] = (next(iter(pins)), any(pins.values()))
    return stated


def _stated_precision(given: dict[str, Any], engine: EngineConfig) -> dict[str, tuple[str, Any]]:
    for name in ("bf16", "fp16"):
        key = f"{name}.enabled"
        if find(given, key):
            return {"precision": (key, name)}
    own = f"{engine.precision}.enabled"
    return {"precision": (own, "fp32")} if find(given, own) is False else {}


def _from_config(config: Config) -> dict[str, Any]:
    engine, dp = config.engine, config.parallel.dp
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage > 0:
        zero["reduce_bucket_size"] = engine.bucket_size
    if engine.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = engine.bucket_size + engine.bucket_size % 2  # DeepSpeed refuses odd numbers
    if engine.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = engine.persistence_threshold
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": engine.pin_memory}
    if engine.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": engine.pin_memory}
    built: dict[str, Any] = {
        "train_batch_size": config.run.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": zero,
        # Turn off DeepSpeed's log line every ten steps: metrics.jsonl has every step.
        "steps_per_print": None,
    }
    if engine.precision != "fp32":
        built[engine.precision] = {"enabled": True}
    if config.parallel.tp > 1:
        # By default, DeepSpeed splits tied embeddings by vocabulary and returns only the rank's own logits.
        built["tensor_parallel"] = {"autotp_size": config.parallel.tp, "vocab_parallel_lm_head": False}
    assert config.run.global_batch == dp * config.micro_batch * config.accumulation
    return built


def _fill(given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(given)
    for key, value in own.items():
        if key not in merged:
            merged[key] = copy.deepcopy(value)
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = _fill(merged[key], value)
    return merged
