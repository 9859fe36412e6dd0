"""Machine-independent checks of settings: types, ranges, and combinations that cannot run."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tutorial_lib.config.fields import ConfigError, EngineConfig, ParallelConfig, RunConfig, Setting

if TYPE_CHECKING:
    from tutorial_lib.config import Config


_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes; limits of Linux and its file systems


def validate(config: Config, settings: Mapping[str, Setting]) -> None:
    """Refuse a configuration that cannot run anywhere.

    Args:
        config: what to run.
        settings: every setting by its flat name.

    Raises:
        ConfigError: says which setting is wrong and what to write instead.
    """
    flat = config.flat()
    for setting in settings.values():
        _check_type(setting, flat[setting.flag])
    engine, parallel, run = config.engine, config.parallel, config.run

    for flag, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} is {value}; write a finite number.")
        if isinstance(value, str) and not value.strip() and flag != "name":
            raise ConfigError(f"{flag} is empty; write a value, or leave the setting out.")
    for setting in settings.values():
        if setting.is_path and flat[setting.flag] is not None:
            check_path(setting.flag, flat[setting.flag])
    for setting in settings.values():
        _check_range(setting, flat[setting.flag])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", run.name):
        raise ConfigError(
            f"Run name {run.name!r} cannot be a directory name. Use only letters, digits, '.', '_' and '-', "
            "at most 200, starting with a letter or digit. To choose the directory of all runs, set storage."
        )
    has_zero = engine.name == "deepspeed" or (engine.name == "trainer" and engine.deepspeed_file is not None)
    if has_zero and engine.offload == "all" and engine.zero_stage != 3:
        raise ConfigError(
            f"offload='all' moves parameters to host memory, which needs zero_stage=3, not {engine.zero_stage}. "
            "Write offload='optimizer', or zero_stage=3."
        )
    if has_zero and engine.offload == "optimizer" and engine.zero_stage == 0:
        raise ConfigError(
            "offload='optimizer' needs optimizer states that ZeRO partitions: write zero_stage=1, 2 or 3, "
            "or offload='none'."
        )
    if engine.precision == "fp16" and run.device == "cpu":
        raise ConfigError("precision='fp16' needs a GPU: on a CPU write precision='bf16' or 'fp32'.")
    if engine.name == "torch":
        if parallel.world_size != 1:
            raise ConfigError(
                f"engine='torch' is the single-process reference, but dp x tp = {parallel.world_size}. "
                "Write dp=1, tp=1, or engine='deepspeed' or 'fsdp'."
            )
        if engine.offload != "none" or engine.deepspeed_file or engine.precision == "fp16":
            raise ConfigError(
                "engine='torch' has no offload and no fp16, and reads no DeepSpeed file; write engine='deepspeed'."
            )
    if engine.name == "trainer" and parallel.tp > 1:
        raise ConfigError(
            f"engine='trainer' has no tensor parallelism, but tp={parallel.tp}. For a model that transformers splits "
            "while loading it, accelerate raises on CPUs: 'ParallelismConfig is only compatible DistributedType.FSDP "
            "(version 2) or DistributedType.Multi{Device} or DistributedType.DEEPSPEED, but got "
            "DistributedType.MULTI_CPU.' Write tp=1, or engine='deepspeed' or 'fsdp'."
        )
    _check_fsdp(engine, parallel)
    _check_shard_at_load(config)
    _check_batch_sizes(config.run, config.parallel.dp)
    if run.stop_after is not None and run.steps is not None and run.stop_after > run.steps:
        raise ConfigError(
            f"stop_after={run.stop_after} is past the last step, steps={run.steps}. Write {run.steps} or less."
        )
    if run.keep_best and not run.evaluate:
        raise ConfigError("keep_best=True compares evaluation losses: write evaluate=True, or keep_best=False.")
    every = run.evaluate_every
    if every is not None and every != "epoch" and not (every.isdecimal() and int(every) > 0):
        raise ConfigError(f"evaluate_every is {every!r}; write 'epoch', or a number of optimizer steps such as '50'.")
    if every is not None and not run.evaluate:
        raise ConfigError(f"evaluate_every={every!r} needs an evaluation: write evaluate=True, or leave it out.")
    if run.score_answers and not run.evaluate:
        raise ConfigError("score_answers=True belongs to an evaluation: write evaluate=True, or leave it out.")
    if run.max_failures > 0 and run.launcher != "ray":
        raise ConfigError(
            f"max_failures={run.max_failures} is for Ray Train; launcher={run.launcher!r} does not restart workers. "
            "Write launcher='ray', or leave max_failures out and run the same command again: it resumes from the "
            "newest intact checkpoint."
        )
    _check_elastic(config.run, config.parallel.dp, settings)


def _check_elastic(run: RunConfig, dp: int, settings: Mapping[str, Setting]) -> None:
    for flag, value in (("min_dp", run.min_dp), ("resource_timeout", run.resource_timeout)):
        if value != settings[flag].default and run.launcher != "ray":
            raise ConfigError(
                f"{flag}={value} is for Ray Train; launcher={run.launcher!r} does not wait for nodes. Write "
                f"launcher='ray', or leave {flag} out."
            )
    if run.min_dp is None:
        return
    if run.min_dp > dp:
        raise ConfigError(f"min_dp={run.min_dp} is more than dp={dp}: write min_dp={dp} or less, or a larger dp.")
    if run.min_dp < dp and not run.checkpoint_every:
        raise ConfigError(
            f"min_dp={run.min_dp}: whenever the number of ranks changes, the run resumes from its newest checkpoint, "
            "and checkpoint_every=0 saves only at the end. Write a checkpoint_every, such as 50."
        )


def check_path(flag: str, name: str) -> None:
    """Refuse a name that no file, directory, hub model or hub data set can have.

    Raises:
        ConfigError: says what is wrong with the name.
    """
    encoded = name.encode(errors="surrogatepass")
    longest = max(map(len, encoded.split(b"/")))
    shown = name if len(name) <= 60 else f"{name[:40]} ..."
    if "\0" in name:
        raise ConfigError(f"{flag} is {shown!r}, which contains a null byte. Write the name without it.")
    if longest > _LONGEST_NAME or len(encoded) > _LONGEST_PATH:
        raise ConfigError(
            f"{flag} is {shown!r}, {len(encoded)} bytes long. A path has at most {_LONGEST_PATH}, and each name in it "
            f"{_LONGEST_NAME}. Write a shorter one."
        )


def check_used(config: Config, stated: Mapping[str, Setting], *, is_resolved: bool = False) -> None:
    """Refuse settings that the caller gave and that this run would ignore. An unused default is not an error.

    Args:
        config: what to run.
        stated: the settings that the caller gave, by flat name.
        is_resolved: whether the values of its DeepSpeed file have been applied to the configuration.

    Raises:
        ConfigError: says what the setting needs to have an effect.
    """
    engine, flat = config.engine, config.flat()
    needs = {
        "persistence_threshold": (engine.zero_stage == 3, "zero_stage=3"),
        "bucket_size": (engine.zero_stage > 0, "zero_stage=1, 2 or 3"),
        "pin_memory": (engine.offload != "none", "offload='optimizer' or 'all'"),
        "tp_plan": (config.parallel.tp > 1, "tp=2 or more"),
        "recompute": (engine.activation_checkpointing, "activation_checkpointing=True"),
    }
    for flag, setting in stated.items():
        if flat[flag] == setting.default:
            continue
        is_met, needed = needs.get(flag, (True, ""))
        if engine.name not in setting.engines:
            needed, is_met = " or ".join(f"engine={name!r}" for name in setting.engines), False
            if engine.name == "trainer" and "torch" not in setting.engines:
                needed += ", or for engine='trainer' a DeepSpeed file that states it (deepspeed='zero2')"
        elif engine.deepspeed_file and not is_resolved:
            continue  # the file may state what is needed
        if not is_met:
            raise ConfigError(
                f"{flag}={flat[flag]!r} would have no effect: it needs {needed}. Set that too, or leave {flag} out."
            )


def check_length(config: Config) -> None:
    """Refuse a run whose length is given twice, and a warm-up that outlasts the run.

    Raises:
        ConfigError: says what to write instead.
    """
    run, warmup = config.run, config.optimizer.warmup_steps
    if run.steps is None:
        return
    if {"steps", "epochs"} <= config.given:
        raise ConfigError(
            f"steps={run.steps} and epochs={run.epochs} both set the length of the run, and epochs would be ignored. "
            "Leave one of them out."
        )
    if config.given & {"steps", "warmup_steps"}:
        check_warmup(warmup, run.steps)


def check_warmup(warmup_steps: int, num_steps: int) -> None:
    """Refuse a warm-up that is longer than the run: the learning rate would never reach its peak.

    Raises:
        ConfigError: says what to write instead.
    """
    if warmup_steps > num_steps:
        raise ConfigError(
            f"warmup_steps={warmup_steps} is longer than the whole run of {num_steps} steps: the learning rate would "
            f"never reach its peak. Write warmup_steps={num_steps} or less, or train longer (steps, epochs)."
        )


SHARDINGS = ("full_shard", "shard_grad_op", "hybrid_shard", "no_shard")
"""FSDP1's names of the sharding strategies, in lower case."""


def _check_fsdp(engine: EngineConfig, parallel: ParallelConfig) -> None:
    if engine.sharding not in SHARDINGS:
        near = difflib.get_close_matches(engine.sharding, SHARDINGS, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"sharding is {engine.sharding!r}.{hint} Write one of: {', '.join(SHARDINGS)}.")
    if engine.name != "fsdp":
        for name in ("sharding", "shard_size", "wrap", "tp_plan", "reduce_each"):
            value, default = getattr(engine, name), EngineConfig.__dataclass_fields__[name].default
            if value != default:
                raise ConfigError(
                    f"{name}={value!r} is a setting of engine='fsdp', not of engine={engine.name!r}. "
                    f"Leave it out, or write engine='fsdp'."
                )
        return
    if engine.precision == "fp16":
        raise ConfigError(
            "engine='fsdp' has no loss scaling, which fp16 needs: write precision='bf16' or precision='fp32'."
        )
    if engine.deepspeed_file:
        raise ConfigError("engine='fsdp' reads no DeepSpeed file: leave it out, or write engine='deepspeed'.")
    if engine.offload == "optimizer":
        raise ConfigError(
            "engine='fsdp' keeps parameters, gradients and optimizer states in one place: write offload='all', or "
            "offload='none'."
        )
    if engine.sharding == "no_shard" and engine.offload != "none":
        raise ConfigError(
            "sharding='no_shard' (DDP) has no offload: write offload='none', or another sharding, such as 'full_shard'."
        )
    if engine.sharding == "no_shard" and parallel.tp > 1:
        raise ConfigError(
            f"sharding='no_shard' (DDP) cannot be combined with tp={parallel.tp}: write tp=1, or sharding='full_shard'."
        )
    if engine.sharding == "no_shard" and engine.wrap != "layer":
        raise ConfigError("sharding='no_shard' (DDP) gathers nothing: leave wrap out, or write sharding='full_shard'.")
    if engine.sharding == "no_shard" and engine.reduce_each:
        raise ConfigError(
            "sharding='no_shard' (DDP) holds full gradients in any case: leave reduce_each out, or write "
            "sharding='full_shard'."
        )
    _check_shard_size(engine, parallel.dp)


def _check_shard_size(engine: EngineConfig, dp: int) -> None:
    if engine.sharding != "hybrid_shard":
        if engine.shard_size is not None:
            raise ConfigError(
                f"shard_size={engine.shard_size} belongs to sharding='hybrid_shard', not to {engine.sharding!r}. "
                "Leave it out, or write sharding='hybrid_shard'."
            )
        return
    possible = [size for size in range(2, dp) if dp % size == 0]
    if not possible:
        raise ConfigError(
            f"sharding='hybrid_shard' splits dp={dp} ranks into groups that share one copy, but {dp} cannot be split. "
            "Write sharding='full_shard', or a dp such as 4."
        )
    if engine.shard_size not in possible:
        raise ConfigError(
            f"sharding='hybrid_shard' shares a copy among shard_size ranks, and shard_size={engine.shard_size} does "
            f"not divide dp={dp} into several groups of several ranks. Write shard_size as one of {possible}."
        )


NO_RESUME = (
    "transformers says: 'Resuming is not supported for models sharded at load time (`DistributedConfig`), so their "
    "optimizer state cannot be checkpointed.' The checkpoint holds the weights alone, which can be exported"
)
"""Reason why a run of a model that was sharded at load cannot be resumed."""


def _check_shard_at_load(config: Config) -> None:
    engine, run = config.engine, config.run
    if not engine.shard_at_load:
        return
    if engine.name != "trainer":
        raise ConfigError(
            f"shard_at_load=True is a setting of engine='trainer', not of engine={engine.name!r}. Leave it out "
            "(engine='fsdp' splits the model anyway), or write engine='trainer'."
        )
    if engine.deepspeed_file:
        raise ConfigError(
            f"shard_at_load=True and deepspeed={engine.deepspeed_file!r} would both split the model states. Leave one "
            "of them out."
        )
    if config.parallel.dp == 1:
        raise ConfigError("shard_at_load=True has nothing to split with dp=1: leave it out, or write dp=2 or more.")
    if config.model.random_init:
        raise ConfigError(
            "shard_at_load=True splits stored weights while reading them, and random_init=True reads none. Save the "
            "random model once and write its directory as the model, or leave one of the two out."
        )
    if engine.precision == "fp16":
        raise ConfigError("shard_at_load=True runs in fp32 and bf16; fp16 is untested. Write precision='bf16'.")
    needs_resume = {"checkpoint_every": run.checkpoint_every, "stop_after": run.stop_after,
                    "max_failures": run.max_failures, "keep_best": run.keep_best}  # fmt: skip
    if asked := [f"{name}={value}" for name, value in needs_resume.items() if value]:
        raise ConfigError(
            f"shard_at_load=True cannot be combined with {asked[0]}, because this run could not be resumed. "
            f"{NO_RESUME}, and is written at the end. Leave {asked[0]} out, or name a DeepSpeed file "
            "(deepspeed='zero3') instead of shard_at_load."
        )


def _check_range(setting: Setting, value: Any) -> None:
    if value is None:
        return
    if setting.at_least is not None and value < setting.at_least:
        raise ConfigError(f"{setting.flag} is {value}; the smallest possible value is {setting.at_least}.")
    if setting.at_most is not None and value > setting.at_most:
        raise ConfigError(f"{setting.flag} is {value}; the largest possible value is {setting.at_most}.")
    if setting.below is not None and value >= setting.below:
        raise ConfigError(f"{setting.flag} is {value}; write a number below {setting.below}.")


def _check_type(setting: Setting, value: Any) -> None:
    if setting.choices and value not in setting.choices:
        raise ConfigError(f"{setting.flag} is {value!r}. Write one of: {', '.join(map(str, setting.choices))}.")
    kinds: Any = {int: int, float: (int, float), str: str, bool: bool, int | None: (int, type(None)),
             float | None: (int, float, type(None)), str | None: (str, type(None)),
             tuple[str, ...]: tuple}[setting.type]  # fmt: skip
    wrong_bool = isinstance(value, bool) and setting.type is not bool
    if wrong_bool or not isinstance(value, kinds):
        name = getattr(setting.type, "__name__", str(setting.type))
        raise ConfigError(f"{setting.flag} is {value!r}, a {type(value).__name__}; write a value of type {name}.")


def _check_batch_sizes(run: RunConfig, dp: int) -> None:
    if run.global_batch % dp:
        near = max(dp, run.global_batch // dp * dp)
        raise ConfigError(
            f"global_batch={run.global_batch} is not a multiple of dp={dp}: the ranks cannot take equal shares. "
            f"Write global_batch={near} or {near + dp}."
        )
    share = run.global_batch // dp
    if run.micro_batch and share % run.micro_batch:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        raise ConfigError(
            f"global_batch={run.global_batch} cannot be split: dp={dp} x micro_batch={run.micro_batch} = "
            f"{dp * run.micro_batch} does not divide it. Write micro_batch as one of {divisors}."
        )
