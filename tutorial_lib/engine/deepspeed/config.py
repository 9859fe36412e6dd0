"""The DeepSpeed configuration: built from a :class:`Config`, or read from a user's JSON file and checked.

DeepSpeed ignores top-level keys that it does not know. An offload section one level too high therefore changes
nothing and says nothing; here it is an error that names the right place. DeepSpeed's defaults for gradient
clipping, pinned memory and the persistence threshold change results or memory, so all three are always stated.

This module does not import DeepSpeed: a configuration can be built and checked before any engine starts. A test
holds its tables of keys to the installed DeepSpeed's own.

Source of the key names: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

import copy
import difflib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

from tutorial_lib.config import Config, ConfigError

DIRECTORY = Path(__file__).parents[2] / "ds_configs"

SECTION_KEYS: dict[str, frozenset[str]] = {
    "zero_optimization": frozenset(
        "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
        "allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights "
        "elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size round_robin_gradients "
        "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
        "stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save "
        "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
        "ignore_unused_parameters legacy_stage1 parameter_alignment zero_hpz_partition_size zero_quantized_weights "
        "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
        "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
        "save_muon_momentum_buffer_in_memory leaf_module".split()
    ),
    "zero_optimization.offload_optimizer": frozenset(
        "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload "
        "cpuadam_cores_perc".split()
    ),
    "zero_optimization.offload_param": frozenset(
        "device nvme_path buffer_count buffer_size max_in_cpu pin_memory".split()
    ),
    "bf16": frozenset(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states".split()
    ),
    "fp16": frozenset(
        "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
        "min_loss_scale fp16_master_weights_and_grads".split()
    ),
    "data_types": frozenset("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules".split()),
    "optimizer": frozenset("type params legacy_fusion".split()),
    "tensor_parallel": frozenset(
        "dtype autotp_size tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend tp injection_policy_tuple "
        "partition_config preset_model keep_module_on_host kernel_inject".split()
    ),
}  # fmt: skip

TOP_LEVEL_KEYS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation "
    "gradient_clipping prescale_gradients gradient_predivide_factor gradient_allreduce_op communication_data_type "
    "steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_python_gc disable_allgather log_level "
    "zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer optimizer scheduler bf16 fp16 "
    "data_types torch_autocast tensor_parallel activation_checkpointing checkpoint comms_logger flops_profiler aio "
    "timers compile tensorboard wandb csv_monitor comet dataloader_drop_last nebula seed".split()
)

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def build(config: Config) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, as the dictionary that ``deepspeed.initialize`` takes.

    With ``config.engine.deepspeed_file`` the file decides, and what it leaves out or calls ``"auto"`` is filled in.

    Raises:
        ConfigError: the file does not parse, holds unknown or misplaced keys, or contradicts the run's batch sizes.
    """
    own = _from_config(config)
    if config.engine.deepspeed_file is None:
        return own
    given = read(config.engine.deepspeed_file)
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


def check_tensor_parallel(config: Config, model_config: Any) -> None:
    """Refuse what DeepSpeed's automatic tensor parallelism (AutoTP) cannot split.

    Args:
        config: what to run.
        model_config: the model's configuration, as transformers gives it.

    Raises:
        ConfigError: an architecture without a plan that AutoTP follows, stage 3 before DeepSpeed 0.19.4, or stage 0 in
            16 bits.
    """
    if config.parallel.tp == 1:
        return
    if config.engine.zero_stage == 0 and config.engine.precision != "fp32":
        raise ConfigError(
            f"zero_stage=0 with tp={config.parallel.tp} and precision={config.engine.precision!r}: DeepSpeed's 16-bit "
            "optimizer without ZeRO counts one rank's gradients alone, and would clip by a norm that is too small. "
            "Write zero_stage=1, or precision='fp32'."
        )
    if config.engine.zero_stage == 3:
        version = importlib.metadata.version("deepspeed")
        if _release(version) < AUTOTP_STAGE_3_SINCE:
            since = ".".join(map(str, AUTOTP_STAGE_3_SINCE))
            raise ConfigError(
                f"zero_stage=3 with tp={config.parallel.tp} needs DeepSpeed {since}, and {version} is installed. "
                "Write zero_stage=2 or less, or update DeepSpeed."
            )
    text = model_config.get_text_config()
    styles = set((getattr(text, "base_model_tp_plan", None) or {}).values())
    if text.model_type in AUTOTP_PRESETS or (styles and styles <= _AUTOTP_STYLES):
        return
    why = f"with {sorted(styles - _AUTOTP_STYLES)} in it" if styles else "without a tensor-parallel plan"
    if text.model_type == "gpt2":
        why = "whose Conv1D layers keep their weights transposed"
    raise ConfigError(
        f"AutoTP does not split {text.model_type}, a model {why}. Write tp=1, or choose a model that it splits: "
        f"embedded/qwen2, embedded/bloom, or another family with a plan for linear layers, such as Llama."
    )


def add_plan(settings: dict[str, Any], model_config: Any) -> None:
    """Name DeepSpeed's own plan in the settings, for a model of which transformers has none."""
    preset = AUTOTP_PRESETS.get(model_config.get_text_config().model_type)
    if preset and "partition_config" not in settings["tensor_parallel"]:
        settings["tensor_parallel"].setdefault("preset_model", preset)


AUTOTP_STAGE_3_SINCE = (0, 19, 4)
"""The first DeepSpeed that takes stage 3 with AutoTP; up to 0.19.3 it refuses."""

AUTOTP_PRESETS = {"bloom": "bloom"}
"""Plans of DeepSpeed's own, by model type, for families of which transformers has none."""

_AUTOTP_STYLES = frozenset(
    {"colwise", "rowwise", "colwise_rep", "colwise_gather_output", "replicated_with_grad_allreduce"}
)


def _release(version: str) -> tuple[int, ...]:
    """``0.19.8+cpu`` as ``(0, 19, 8)``."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d", version)[0].split("."))  # type: ignore[index]


def apply_file(config: Config) -> Config:
    """The configuration with the settings that its DeepSpeed file decides, so that records tell what really ran.

    Raises:
        ConfigError: as :func:`build`, or the file's settings cannot run (see :mod:`tutorial_lib.config`).
    """
    if config.engine.deepspeed_file is None:
        return config
    given = read(config.engine.deepspeed_file)
    zero = given.get("zero_optimization", {})
    flat: dict[str, Any] = {"zero_stage": _stated(zero, "stage", 0)}
    offload = {part: zero.get(f"offload_{part}", {}).get("device", "none") for part in ("param", "optimizer")}
    for part, device in offload.items():
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"{config.engine.deepspeed_file}: offload_{part}.device is {device!r}; this package offloads to "
                "'cpu' or 'none'."
            )
    if offload["param"] == "cpu" and offload["optimizer"] != "cpu":
        raise ConfigError(
            f"{config.engine.deepspeed_file}: offload_param without offload_optimizer is not a combination that this "
            "package runs. Add zero_optimization.offload_optimizer, or remove offload_param."
        )
    flat["offload"] = "all" if offload["param"] == "cpu" else "optimizer" if offload["optimizer"] == "cpu" else "none"
    for part in ("param", "optimizer"):
        if offload[part] == "cpu":
            flat["pin_memory"] = bool(zero[f"offload_{part}"].get("pin_memory", config.engine.pin_memory))
    for precision in ("bf16", "fp16"):
        if _stated(given.get(precision, {}), "enabled", config.engine.precision == precision):
            flat["precision"] = precision
            break
    else:
        flat["precision"] = "fp32"
    flat["gradient_clipping"] = float(_stated(given, "gradient_clipping", config.optimizer.gradient_clipping))
    flat["persistence_threshold"] = _stated(
        zero, "stage3_param_persistence_threshold", config.engine.persistence_threshold
    )
    flat.update(_optimizer_settings(given, config))
    resolved = config.override(**flat)
    build(resolved)
    return resolved


def read(name: str) -> dict[str, Any]:
    """A DeepSpeed JSON file, by path or by its name in ``tutorial_lib/ds_configs``, checked.

    Raises:
        ConfigError: no such file, no valid JSON object, or unknown or misplaced keys.
    """
    shipped = DIRECTORY / f"{name.removesuffix('.json')}.json"
    path = Path(name) if Path(name).is_file() else shipped
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in DIRECTORY.glob("*.json")))
        raise ConfigError(f"There is no DeepSpeed file {name!r}. Write a path, or one of: {names}.")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{name} holds a JSON {type(given).__name__}; DeepSpeed needs an object.")
    check(given, source=name)
    return given


def check(given: dict[str, Any], *, source: str = "the DeepSpeed configuration") -> None:
    """Refuse keys that DeepSpeed would ignore or reject.

    Raises:
        ConfigError: names each wrong key and where it belongs.
    """
    problems = [_advice(key, "", TOP_LEVEL_KEYS) for key in given if key not in TOP_LEVEL_KEYS]
    for section, keys in SECTION_KEYS.items():
        inside: Any = given
        for part in section.split("."):
            inside = inside.get(part, {}) if isinstance(inside, dict) else {}
        if not isinstance(inside, dict):
            problems.append(f"{section} is {inside!r}; write an object")
            continue
        problems += [_advice(key, section, keys) for key in inside if key not in keys]
    if "scheduler" in given:
        problems.append("'scheduler' is not read from the file: use the settings schedule and warmup_steps")
    if problems:
        raise ConfigError(f"In {source}: " + "; ".join(problems) + ".")


def _advice(key: str, section: str, keys: frozenset[str]) -> str:
    place = f"in {section}" if section else "at the top level"
    homes = [name for name, known in SECTION_KEYS.items() if key in known and name != section]
    if section and key in TOP_LEVEL_KEYS:
        return f"{key!r} has no meaning {place}; it belongs at the top level"
    if homes:
        return (
            f"{key!r} has no meaning {place}, where DeepSpeed would ignore or refuse it; it belongs under {homes[0]!r}"
        )
    near = difflib.get_close_matches(key, keys, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key!r} is not a key that DeepSpeed knows {place}{hint}"


def _from_config(config: Config) -> dict[str, Any]:
    engine, dp = config.engine, config.parallel.dp
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage > 0:
        zero["reduce_bucket_size"] = engine.bucket_size
    if engine.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = engine.bucket_size
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
        # No line per ten steps in the log: metrics.jsonl has every one.
        "steps_per_print": None,
    }
    if engine.precision != "fp32":
        built[engine.precision] = {"enabled": True}
    if config.parallel.tp > 1:
        # Left to itself, DeepSpeed splits tied embeddings by vocabulary and returns a rank's own logits alone.
        built["tensor_parallel"] = {"autotp_size": config.parallel.tp, "vocab_parallel_lm_head": False}
    assert config.run.global_batch == dp * config.micro_batch * config.accumulation
    return built


def _fill(given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(given)
    for key, value in own.items():
        if key not in merged or merged[key] == "auto":
            merged[key] = copy.deepcopy(value)
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = _fill(merged[key], value)
    return merged


def _stated(section: dict[str, Any], key: str, otherwise: Any) -> Any:
    value = section.get(key, otherwise)
    return otherwise if value == "auto" else value


def _optimizer_settings(given: dict[str, Any], config: Config) -> dict[str, Any]:
    section = given.get("optimizer")
    if section is None:
        return {}
    if str(section.get("type", "")).lower() not in ("adam", "adamw"):
        raise ConfigError(
            f"{config.engine.deepspeed_file}: optimizer.type is {section.get('type')!r}, but this package trains "
            "with AdamW. Write that, or remove the section."
        )
    params = section.get("params", {})
    known = {"lr": "learning_rate", "eps": "eps", "weight_decay": "weight_decay"}
    flat = {ours: float(params[theirs]) for theirs, ours in known.items() if params.get(theirs, "auto") != "auto"}
    if params.get("betas", "auto") != "auto":
        flat["beta1"], flat["beta2"] = (float(beta) for beta in params["betas"])
    return flat
