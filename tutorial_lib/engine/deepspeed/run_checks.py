"""Checks of a DeepSpeed file against the run that uses it, before any engine starts.

This module does not import DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import json
import pydoc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutorial_lib.config import ConfigError, EngineConfig, RunConfig
from tutorial_lib.engine.deepspeed.file import find, read
from tutorial_lib.engine.deepspeed.keys import (
    AT_STAGE_3,
    DTYPES,
    MONITORS,
    ON_GPUS,
    OTHER_LAYOUT,
    WRITES_INTO,
)


def check_for_run(given: dict[str, Any], engine: EngineConfig, run: RunConfig, *, source: str) -> None:
    """Refuse keys that do not work with this run's precision, stage, device or installed packages.

    Args:
        given: the settings that :func:`.file.read` returned.
        engine: the engine, with the file's settings applied.
        run: the run's settings, for its device.
        source: the file's name.

    Raises:
        ConfigError: names the key, and what to write instead.
    """
    stage, precision = engine.zero_stage, engine.precision
    if (engine.name, stage, precision) == ("trainer", 0, "fp16"):
        raise ConfigError(
            f"{source}: with stage 0 and fp16, DeepSpeed 0.19.8 forgets to scale the Trainer's loss but divides the "
            "gradients by the scale, 65,536 at first by default, so they are too small (DeepSpeed pull request 8393). "
            "Write precision='bf16', stage 1, or engine='deepspeed', which scales the loss itself."
        )
    communication = find(given, "communication_data_type")
    if communication is not None and communication.lower() not in DTYPES:
        raise ConfigError(
            f"{source}: communication_data_type is {json.dumps(communication)}; write one of: {', '.join(DTYPES)}."
        )
    kinds = {alias: dtype for dtype, aliases in DTYPES.items() for alias in aliases}
    for key in (*(f"data_types.{name}_dtype" for name in ("grad_accum", "param", "buffer")), "torch_autocast.dtype"):
        dtype = find(given, key)
        if dtype is not None and dtype not in kinds:
            raise ConfigError(f"{source}: {key} is {json.dumps(dtype)}; write one of: {', '.join(DTYPES)}.")
    accumulated = kinds.get(find(given, "data_types.grad_accum_dtype"), precision)
    if accumulated != precision and (stage == 0 or (stage, precision, engine.offload) == (1, "bf16", "none")):
        raise ConfigError(
            f"{source}: data_types.grad_accum_dtype is {accumulated!r}: with zero_stage={stage} and "
            f"precision={precision!r}, DeepSpeed uses a different optimizer for that or has none, and {OTHER_LAYOUT}. "
            "Write zero_stage=2, or remove it."
        )
    if stage > 1 and find(given, "zero_optimization.reduce_scatter", True):
        for key, only in (("gradient_predivide_factor", 1), ("prescale_gradients", False)):
            if (value := find(given, key, only)) != only:
                raise ConfigError(
                    f"{source}: {key} is {json.dumps(value)}, which DeepSpeed does not accept with zero_stage={stage} "
                    "and zero_optimization.reduce_scatter. Remove it, set reduce_scatter to false, or write "
                    "zero_stage=1."
                )
    gathered = find(given, "zero_optimization.allgather_bucket_size", 0)
    if stage in (1, 2) and gathered % 2:
        raise ConfigError(
            f"{source}: zero_optimization.allgather_bucket_size is {gathered}, and DeepSpeed does not accept odd "
            f"numbers with zero_stage={stage}. Write {gathered + 1}."
        )
    _check_low_precision_masters(given, engine, source)
    for name in ("leaf_module", *AT_STAGE_3):
        if stage < 3 and find(given, f"zero_optimization.{name}"):
            raise ConfigError(
                f"{source}: zero_optimization.{name} is for partitioned parameters, and would have no effect "
                f"with zero_stage={stage}. Remove it, or write zero_stage=3."
            )
    for name in find(given, "torch_autocast.lower_precision_safe_modules", []):
        if pydoc.locate(name) is None:
            raise ConfigError(
                f"{source}: torch_autocast.lower_precision_safe_modules holds {name!r}, which cannot be imported. "
                "Write a class with its module, such as torch.nn.Linear."
            )
    parameters = kinds.get(find(given, "data_types.param_dtype"), precision)
    if parameters != precision:
        raise ConfigError(
            f"{source}: data_types.param_dtype is {parameters!r}, but the run's precision is {precision!r}. Write "
            f"{precision!r}, or remove the key."
        )
    for name in ON_GPUS:
        if run.device == "cpu" and find(given, f"zero_optimization.{name}"):
            raise ConfigError(
                f"{source}: zero_optimization.{name} is true, but its kernels need a GPU: write device='cuda', or "
                "remove it."
            )
    for name, module in MONITORS.items():
        if find(given, f"{name}.enabled") and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"{source}: {name}.enabled is true, but the package {module!r} is not installed. Install it "
                f"(pip install {module}), write false, or use csv_monitor."
            )


def _check_low_precision_masters(given: dict[str, Any], engine: EngineConfig, source: str) -> None:
    """Refuse master weights and moments in 16 bits if DeepSpeed or its Adam cannot keep them in 16 bits."""
    states = find(given, "bf16.bf16_optimizer_states", False)
    for precision in ("bf16", "fp16"):
        key = f"{precision}.{precision}_master_weights_and_grads"
        problem = None
        if not find(given, key, False):
            continue
        if engine.precision != precision:
            problem = (
                f"needs precision={precision!r}, not {engine.precision!r}. Remove it, or write precision={precision!r}"
            )
        elif engine.zero_stage == 0:
            problem = "needs an optimizer that ZeRO partitions. Remove it, or write zero_stage=1, 2 or 3"
        elif engine.offload == "none" and not (states and precision == "bf16"):
            problem = "needs an optimizer on the host. Remove it, or write offload='optimizer'"
        if problem:
            raise ConfigError(f"{source}: {key} is true, which {problem}.")
    if states and not find(given, "bf16.bf16_master_weights_and_grads", False):
        raise ConfigError(
            f"{source}: bf16.bf16_optimizer_states is true, which needs bf16.bf16_master_weights_and_grads. Set both, "
            "or remove it."
        )
    if states and engine.offload != "none":
        raise ConfigError(
            f"{source}: bf16.bf16_optimizer_states is true, but an optimizer on the host keeps its moments in fp32 "
            "here. Remove it, or write offload='none'."
        )


def check_outputs(source: str) -> None:
    """Create the directories of a file's monitors and profiler, and refuse any that cannot be written to.

    Args:
        source: the DeepSpeed file.

    Raises:
        ConfigError: names the key and the reason.
    """
    given = read(source)
    outputs = {
        f"{name}.output_path": Path(
            find(given, f"{name}.output_path", ""), find(given, f"{name}.job_name", "DeepSpeedJobName")
        )
        for name in WRITES_INTO
        if find(given, f"{name}.enabled")
    }
    profile = find(given, "flops_profiler.output_file")
    if profile and find(given, "flops_profiler.enabled"):
        outputs["flops_profiler.output_file"] = Path(profile).parent
    for key, directory in outputs.items():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise ConfigError(
                f"{source}: {key}: {str(directory)!r} cannot be written to: {error.strerror}. Write a directory that "
                "you can write to."
            ) from error


def check_leaf_modules(source: str, outline: Callable[[], Any]) -> None:
    """Refuse a ``leaf_module`` that names modules the model does not have: DeepSpeed would only log them.

    Args:
        source: the DeepSpeed file.
        outline: function that returns the model, whose values do not matter. It is called only if the file has a
            ``leaf_module``.

    Raises:
        ConfigError: names the missing module, and some that exist.
    """
    leaves = find(read(source), "zero_optimization.leaf_module")
    if not leaves:
        return
    modules = dict(outline().named_modules())
    kinds = {type(module) for module in modules.values()}
    classes = {kind.__name__ for kind in kinds}
    exists: dict[str, Callable[[str], bool]] = {
        "classes": lambda wanted: wanted in classes | {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds},
        "names": lambda wanted: wanted in modules,
        "name_suffixes": lambda wanted: any(each.endswith(wanted) for each in modules),
    }
    for key, wanted in leaves.items():
        for each in wanted:
            if not exists[key](each):
                some = sorted(classes if key == "classes" else filter(None, modules), key=len)[:3]
                raise ConfigError(
                    f"{source}: zero_optimization.leaf_module.{key} holds {each!r}, which the model does not have. It "
                    f"has, for instance: {', '.join(some)}."
                )
