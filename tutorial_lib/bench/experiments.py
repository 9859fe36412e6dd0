"""Experiments of a benchmark matrix: the rows by name, with the settings in which they differ.

A matrix is data. To add one, add names and settings to :data:`EXPERIMENTS`. Some engines read their ZeRO settings from
a DeepSpeed file. For these, :func:`rows_of` chooses the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tutorial_lib.config import Config, ConfigError, EngineConfig, RunConfig
from tutorial_lib.config.workshop import looks_like_experiment, parse_experiment

Overrides = dict[str, Any]
"""Settings by flat name."""

_PLAIN: Overrides = {"zero_stage": 0, "offload": "none", "pin_memory": False}


def _zero(stage: int, offload: str = "none", *, pinned: bool = False) -> Overrides:
    return {"zero_stage": stage, "offload": offload, "pin_memory": pinned}


STAGES: dict[str, Overrides] = {
    "baseline": {"engine": "torch", "dp": 1},
    **{f"stage-{stage}": _zero(stage) for stage in range(4)},
}

OFFLOAD: dict[str, Overrides] = {
    "stage-1": _zero(1),
    "stage-1-offload": _zero(1, "optimizer"),
    "stage-1-offload-pinned": _zero(1, "optimizer", pinned=True),
    "stage-2": _zero(2),
    "stage-2-offload": _zero(2, "optimizer"),
    "stage-2-offload-pinned": _zero(2, "optimizer", pinned=True),
    "stage-3": _zero(3),
    "stage-3-offload": _zero(3, "all"),
    "stage-3-offload-pinned": _zero(3, "all", pinned=True),
}
"""Rows with and without offload. Stage 3 also offloads the parameters, as in the workshop's zero3_cpu_offload.json."""

SCALING: dict[str, Overrides] = {f"dp-{ranks}": {"dp": ranks} for ranks in (1, 2, 4)}

EXPERIMENTS: dict[str, dict[str, Overrides]] = {
    "zero-stages": STAGES,
    "offload": OFFLOAD,
    "weak-scaling": SCALING,
    "strong-scaling": SCALING,
}

IS_SCALING = frozenset({"weak-scaling", "strong-scaling"})

FILES: dict[tuple[int, str, bool], str] = {
    **{(stage, "none", False): f"zero{stage}" for stage in range(4)},
    (1, "optimizer", False): "zero1_cpu_offload",
    (2, "optimizer", False): "zero2_cpu_offload",
    (2, "optimizer", True): "zero2_cpu_offload_pinned_memory",
    (3, "all", False): "zero3_cpu_offload",
}
"""Files of ``ds_configs`` by stage, offload and pinned memory, for engines that read ZeRO settings from a file."""

FILE_ENGINES = frozenset({"trainer"})
"""Engines that read their ZeRO settings from a DeepSpeed file, and train without ZeRO if there is none."""

_RANKS_NAME = re.compile(r"dp-([1-9]\d*)")


def rows_of(experiment: str, config: Config, chosen: Sequence[str] = ()) -> dict[str, Config]:
    """Return the rows of a matrix, each with its complete configuration except for its name and storage.

    Args:
        experiment: one of :data:`EXPERIMENTS`.
        config: the settings that all rows have in common.
        chosen: names of the rows to run, in this order: rows of the matrix, ``dp-N``, or a name of the original
            workshop such as ``2ZO-1G1N`` (stage 2 with offload, 1 GPU in total, 1 node; ``2ZOP`` with pinned memory).
            Default: all rows of the matrix that make sense for the configuration.

    Raises:
        ConfigError: an unknown name, a setting that the matrix sets itself, or a row with invalid settings.
    """
    if experiment not in EXPERIMENTS:
        raise ConfigError(f"There is no matrix {experiment!r}. Write one of: {', '.join(EXPERIMENTS)}.")
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"rows: {', '.join(chosen)} names a row twice; write each once.")
    known = EXPERIMENTS[experiment]
    sensible = {name: known[name] for name in known if _makes_sense(known[name], config.run, config.engine)}
    rows = {name: _named(name, known) for name in chosen} if chosen else sensible
    _refuse_replaced(experiment, config, rows)
    return {name: _configure(experiment, name, overrides, config) for name, overrides in rows.items()}


def workshop_name(name: str) -> Overrides | None:
    """Return the settings for a name of the original workshop, such as ``2ZO-1G1N``, or None for any other name.

    Raises:
        ConfigError: the name looks like one of the workshop's, but cannot be run.
    """
    if not looks_like_experiment(name):
        return None
    experiment = parse_experiment(name)
    return {**experiment.settings, "dp": experiment.gpus}


def _named(name: str, known: Mapping[str, Overrides]) -> Overrides:
    if name in known:
        return known[name]
    if (overrides := workshop_name(name)) is not None:
        return overrides
    if match := _RANKS_NAME.fullmatch(name):
        return {"dp": int(match[1])}
    raise ConfigError(
        f"There is no row {name!r}. Write one of: {', '.join(known)}; dp-N; or a name of the workshop, such as "
        "2ZO-1G1N: stage 2, offload, 1 GPU, 1 node."
    )


def _makes_sense(overrides: Overrides, run: RunConfig, engine: EngineConfig) -> bool:
    """Return whether a row makes sense.

    Pinned memory needs a GPU. Engines that read DeepSpeed files need a file for the row, and refuse stage 0 in fp16.
    """
    if overrides.get("pin_memory") and run.device == "cpu":
        return False
    if engine.name not in FILE_ENGINES or "zero_stage" not in overrides:
        return True
    unscaled = engine.precision == "fp16" and overrides["zero_stage"] == 0
    return _file_key(overrides) in FILES and not unscaled


def _file_key(overrides: Overrides) -> tuple[int, str, bool]:
    return overrides["zero_stage"], overrides["offload"], overrides["pin_memory"]


def _refuse_replaced(experiment: str, config: Config, rows: Mapping[str, Overrides]) -> None:
    """Refuse settings that the caller gave and that rows would replace with other values."""
    flat = config.flat()
    replaced = {flag for overrides in rows.values() for flag, value in overrides.items() if value != flat[flag]}
    replaced -= {"engine"}
    if any("zero_stage" in overrides for overrides in rows.values()):
        replaced.add("deepspeed")
    if "dp" in replaced and not all("dp" in overrides for overrides in rows.values()):
        replaced.remove("dp")  # only the baseline's single process differs; all other rows use the given dp
    if given := sorted(replaced & config.given):
        raise ConfigError(
            f"The rows of this {experiment} matrix set {given[0]} themselves ({', '.join(rows)}). Leave it out, or "
            "choose rows that do not."
        )
    if "stop_after" in config.given:
        raise ConfigError("stop_after would leave every row unfinished: write steps instead.")
    varies_zero = any("zero_stage" in overrides for overrides in rows.values())
    if varies_zero and config.engine.name not in {"deepspeed", *FILE_ENGINES}:
        raise ConfigError(
            f"{experiment} compares ZeRO's stages, which engine={config.engine.name!r} does not have. Write "
            "engine='deepspeed', or another matrix, such as strong-scaling."
        )


def _configure(experiment: str, name: str, overrides: Overrides, config: Config) -> Config:
    engine = config.engine.name
    if overrides.get("engine") == "torch":  # the baseline: one process without ZeRO
        own = engine if engine in FILE_ENGINES else "torch"
        overrides = {**_PLAIN, "deepspeed": None, **overrides, "engine": own}
    elif "zero_stage" in overrides and engine in FILE_ENGINES:
        if _file_key(overrides) not in FILES:
            raise ConfigError(f"Row {name}: there is no DeepSpeed file in ds_configs for it. Leave this row out.")
        rest = {flag: value for flag, value in overrides.items() if flag not in _PLAIN}
        overrides = {**rest, "deepspeed": FILES[_file_key(overrides)]}
    elif "zero_stage" in overrides:
        overrides = {**overrides, "deepspeed": None}
    if experiment == "weak-scaling":
        overrides = {**overrides, "global_batch": config.run.global_batch * overrides["dp"]}
    try:
        return config.replaced(**overrides)
    except ConfigError as error:
        raise ConfigError(f"Row {name}: {error}") from error
