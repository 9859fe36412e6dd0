"""Planner's predictions for a run: its workload and layout, and from these its states, peak and seconds per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tutorial_lib.config import Config, ConfigError, EngineConfig
from tutorial_lib.engine.deepspeed import file
from tutorial_lib.models.dimensions import read_config
from tutorial_lib.theory import peak_memory
from tutorial_lib.theory.cost import evaluate
from tutorial_lib.theory.dimensions import Dimensions
from tutorial_lib.theory.hardware import find_product
from tutorial_lib.theory.layouts import Cluster, Layout, Workload
from tutorial_lib.theory.state_bytes import States, layout_states

DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's default ``reduce_bucket_size``, in elements. It applies under the Trainer if the file states none."""


def predict_step_peak(config: Config) -> float | None:
    """Return the bytes that a step should allocate at its peak, beyond what exists before it.

    Args:
        config: a configuration to which the values of its DeepSpeed file have been applied.

    Returns:
        The bytes of the rank with the most, or None if the planner does not know this kind of run: a model sharded at
        load, or one that is not a dense decoder.
    """
    planned = _planned(config)
    return planned and states_and_peak(*planned, config.accumulation)[1]


def predict_step_seconds(config: Config, ranks: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the seconds that a step should take, if all its rows have ``seq_length`` tokens.

    Args:
        config: a configuration to which the values of its DeepSpeed file have been applied.
        ranks: the entry of each rank in ``result.json``.

    Returns:
        The seconds, or None if the speed of the devices is unknown: they are CPUs, GPUs without a preset, or of
        different kinds. Also None for every run for which :func:`predict_step_peak` returns None.
    """
    devices = {rank.get("device", "cpu") for rank in ranks}
    preset, planned = find_product(devices.pop()) if len(devices) == 1 else None, _planned(config)
    if preset is None or planned is None:
        return None
    per_node = min(rank["ranks_on_node"] for rank in ranks)
    try:
        cluster = Cluster.of(preset, len(ranks), config.engine.precision, gpus_per_node=per_node)
    except ValueError:  # the preset has no speed for this precision, such as bf16 on a V100
        return None
    workload, layout = planned
    return evaluate(workload, cluster, layout).seconds


def _planned(config: Config) -> tuple[Workload, Layout] | None:
    if config.engine.shard_at_load:
        return None
    try:
        dimensions, num_params = read_config(config.model.name)
    except ConfigError:
        return None
    return workload_and_layout(config, dimensions, num_params)


def states_and_peak(workload: Workload, layout: Layout, accumulation: int) -> tuple[States, float]:
    """Return a rank's model states, and the bytes that a step allocates at its peak.

    Weights and moments exist before the step, so the peak leaves them out. It also leaves out the bucket and the
    gradients of DeepSpeed's stage 3, because these exist before the step, too.
    """
    part = peak_memory.part_of_model(workload.dimensions, workload.num_params, layout.tp, engine=layout.engine)
    states = layout_states(workload, layout, part.params, accumulation, layout.shard_size or layout.dp)
    new = 0.0 if peak_memory.keeps_gradients(layout) else states.gradients
    existing = states.device - new + peak_memory.standing_bucket(workload, layout)
    return states, peak_memory.peak_memory(workload, layout, part, states, accumulation).total - existing


def workload_and_layout(config: Config, dimensions: Dimensions, num_params: int) -> tuple[Workload, Layout]:
    """Translate a run into the planner's terms.

    Args:
        config: settings of the run.
        dimensions: dimensions of the model.
        num_params: number of parameters of the model.
    """
    engine, parallel = config.engine, config.parallel
    if engine.name == "torch" or (engine.name == "trainer" and engine.deepspeed_file is None):
        strategy: str | None = "no_shard"
        stage = 0
    elif engine.name == "fsdp":
        strategy = "hybrid" if engine.sharding == "hybrid_shard" else engine.sharding
        stage = {"no_shard": 0, "shard_grad_op": 2}.get(engine.sharding, 3)
    else:
        strategy, stage = None, engine.zero_stage
    checkpointing = engine.recompute if engine.activation_checkpointing else "none"
    workload = Workload(
        num_params=num_params, dimensions=dimensions, seq_length=config.data.seq_length, micro_batch=config.micro_batch,
        global_batch=config.run.global_batch, precision=engine.precision, bucket_size=_bucket_size(engine, dimensions),
        checkpointing=checkpointing, on_gpu=config.run.device != "cpu", loss_chunks=engine.loss_chunks,
        fused_adamw=engine.name == "fsdp", **_from_deepspeed_file(engine.deepspeed_file),
    )  # fmt: skip
    layout = Layout(
        dp=parallel.dp, tp=parallel.tp, zero_stage=stage, strategy=strategy, shard_size=engine.shard_size,
        offload=engine.offload, micro_batch=config.micro_batch, checkpointing=checkpointing,
        reduction="each" if engine.reduce_each else "last",
    )  # fmt: skip
    return workload, layout


def _bucket_size(engine: EngineConfig, dimensions: Dimensions) -> int:
    """Return the size of DeepSpeed's bucket, in elements. The Trainer sets it only if its file says ``"auto"``."""
    name = engine.deepspeed_file
    if engine.name != "trainer" or name is None:
        return engine.bucket_size
    stated = file.find(file.read_json(name), "zero_optimization.reduce_bucket_size", DEFAULT_BUCKET)
    return dimensions.hidden**2 if stated == "auto" else int(stated)


def _from_deepspeed_file(name: str | None) -> dict[str, Any]:
    """Return values of a run's DeepSpeed file that are not settings of the run, or DeepSpeed's defaults for them.

    Raises:
        ConfigError: the file no longer exists, or DeepSpeed does not accept it.
    """
    zero = {} if name is None else file.read(name).get("zero_optimization", {})
    scatters = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
    return {
        "gradient_reduction": "reduce_scatter" if scatters else "all_reduce",
        "overlap_comm": zero.get("overlap_comm") or False,
        "live_params": zero.get("stage3_max_live_parameters", 1_000_000_000),
        "sub_group_size": zero.get("sub_group_size", 1_000_000_000),
    }
