"""Expected model states: exact bytes on each data-parallel rank, from the formulas of ``theory.memory``.

Where DeepSpeed deviates from the paper, these bytes follow DeepSpeed: it keeps a master copy even of fp32 weights,
holds a gradient in full on every rank that shares it, and keeps gradients in fp32 if it offloads. For a step's peak,
see ``predictions``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tutorial_lib.config import Config, EngineConfig, ModelConfig
from tutorial_lib.engine.deepspeed.file import find, read_json
from tutorial_lib.theory import memory
from tutorial_lib.theory.memory import DEEPSPEED_FP32, FP32, MIXED, ModelStates


@dataclass(frozen=True, slots=True)
class ParameterSizes:
    """Number of elements of each parameter, in the model's order, with tied parameters counted once.

    Attributes:
        trained: sizes of parameters with a gradient.
        frozen: sizes of all other parameters.
        persistent: total size of the parameters that stage 3 keeps in full on every rank because they are small.
    """

    trained: tuple[int, ...]
    frozen: tuple[int, ...] = ()
    persistent: int = 0


def parameter_sizes(m: ModelConfig, engine: EngineConfig) -> ParameterSizes:
    """Return the sizes of a run's parameters, without allocating them.

    Raises:
        ConfigError: there is no such model, or a pattern of ``freeze`` matches nothing.
    """
    from tutorial_lib.models.meta import model_outline

    model = model_outline(m, engine)
    parameters = list(model.parameters())
    threshold = _persistence_threshold(engine, model.config.get_text_config().hidden_size)
    return ParameterSizes(
        tuple(p.numel() for p in parameters if p.requires_grad),
        tuple(p.numel() for p in parameters if not p.requires_grad),
        sum(p.numel() for p in parameters if p.numel() <= threshold),
    )


def _persistence_threshold(engine: EngineConfig, hidden: int) -> int:
    """Return the largest size, in elements, of the parameters that stage 3 keeps in full."""
    file = engine.deepspeed_file
    if engine.name != "trainer" or file is None:
        return engine.persistence_threshold
    # If the file states nothing, DeepSpeed's own default applies.
    stated = find(read_json(file), "zero_optimization.stage3_param_persistence_threshold", 100_000)
    return 10 * hidden if stated == "auto" else int(stated)  # the Trainer replaces "auto" with this


def expected_states(config: Config, sizes: ParameterSizes) -> list[ModelStates] | None:
    """Return the maximum bytes of model states that each data-parallel rank should hold, on its device and on the host.

    Args:
        config: a configuration to which the values of its DeepSpeed file have been applied.
        sizes: sizes of the model's parameters.

    Returns:
        A :class:`ModelStates` per rank, or None where this module has no formula: with tensor parallelism, and for a
        model sharded at load, because transformers then reduces the gradients of tied weights twice.
    """
    if config.parallel.tp > 1 or config.engine.shard_at_load:
        return None
    engine, ranks = config.engine, config.parallel.dp
    if engine.name == "deepspeed" or engine.deepspeed_file:
        return [_zero(config, sizes, rank) for rank in range(ranks)]
    pieces = 1
    if engine.name == "fsdp" and engine.sharding != "no_shard":
        pieces = engine.shard_size or ranks
    return [_paper_states(sizes, 3, pieces, FP32)] * ranks


def _paper_states(sizes: ParameterSizes, stage: int, ranks: int, precision: memory.Precision) -> ModelStates:
    """Return the paper's model states. Frozen parameters have neither gradients nor optimizer states."""
    trained = memory.model_states(sum(sizes.trained), stage, ranks, precision)
    share = memory.partition_elements(sum(sizes.frozen), ranks if stage == 3 else 1)
    return ModelStates(trained.parameters + precision.parameters * share, trained.gradients, trained.optimizer)


def _zero(config: Config, sizes: ParameterSizes, rank: int) -> ModelStates:
    engine, ranks = config.engine, config.parallel.dp
    in_fp32, stage = engine.precision == "fp32", engine.zero_stage
    if stage == 0:
        return _paper_states(sizes, 0, ranks, FP32 if in_fp32 else MIXED)
    precision = DEEPSPEED_FP32 if in_fp32 else MIXED
    states = _paper_states(sizes, stage, ranks, precision)
    if engine.offload != "none":  # each rank keeps its share in fp32, next to its master copy
        gradients = 4 * memory.partition_elements(sum(sizes.trained), ranks)
        if stage == 1 and config.accumulation > 1:  # full gradients also wait until the last micro-batch
            gradients += states.gradients
    elif stage == 3:
        gradients = precision.gradients * memory.partitioned_elements(sizes.trained, ranks)
    elif stage == 1 and config.accumulation > 1:  # full gradients wait until the last micro-batch
        gradients = states.gradients
    else:
        gradients = precision.gradients * memory.reduced_gradients(sizes.trained, ranks, rank)
    parameters, optimizer = states.parameters, states.optimizer
    if stage == 3:  # every parameter is divided and padded separately
        shards = memory.partitioned_elements([*sizes.trained, *sizes.frozen], ranks)
        parameters = precision.parameters * (shards + (sizes.persistent if ranks > 1 else 0))
        optimizer = precision.optimizer * memory.partitioned_elements(sizes.trained, ranks)
    return ModelStates(parameters, gradients, optimizer)


def on_device(engine: EngineConfig, states: ModelStates) -> ModelStates:
    """Return the part of a rank's model states that stays on its device despite offload."""
    offload, stage = engine.offload, engine.zero_stage
    if offload == "none":
        return states
    if offload == "all":  # only layers that are gathered at the moment use device memory
        return ModelStates(0, 0, 0)
    # Stage 1 keeps the full gradient, as large as the weights, on the device until it is reduced.
    return ModelStates(states.parameters, states.parameters if stage == 1 else 0, 0)
