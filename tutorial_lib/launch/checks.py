"""Preflight checks: refuse a run that cannot work here, before any process starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tutorial_lib.config import Config, ConfigError, ParallelConfig, RunConfig
from tutorial_lib.config.checks import NO_RESUME
from tutorial_lib.doctor.machine import MEMORY_TO_START_GB, available_memory_gb
from tutorial_lib.launch.command import plural
from tutorial_lib.launch.environment import check_environment, joined_rank, ray_address
from tutorial_lib.records import RunDirectory

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LOG = logging.getLogger(__name__)

FREE_MEMORY_SHARE = 1 / 3
"""Share of memory to keep free of model states, relative to the memory left once all processes have started. On a CPU,
BLOOM with 560 million parameters and an offloaded optimizer peaked at 1.5 times its states, while DeepSpeed was copying
them."""


def preflight(config: Config) -> Config:
    """Refuse a configuration that cannot run here, before a process starts.

    Returns:
        The configuration with the values of its DeepSpeed file applied, the default number of rows, and absolute paths.

    Raises:
        ConfigError: says why the run cannot work here, and what to write instead.
        CheckpointError: there are checkpoints, but none of them can be resumed.
    """
    from tutorial_lib.checkpoint import latest
    from tutorial_lib.checkpoint.compatibility import check_continues, reads_data
    from tutorial_lib.checkpoint.lock import check_free
    from tutorial_lib.checkpoint.manifest import read_trainer_state
    from tutorial_lib.checkpoint.storage import check_storage
    from tutorial_lib.dataloader import check_data, data_identity
    from tutorial_lib.dataloader.subset import choose_subset
    from tutorial_lib.engine.deepspeed.config import apply_file, check_autotp
    from tutorial_lib.engine.deepspeed.run_checks import check_leaf_modules, check_outputs
    from tutorial_lib.engine.trial_forward import trial_forward
    from tutorial_lib.models import (
        check_sequence_length,
        check_tensor_parallel,
        check_vocabulary,
        load_config,
        load_tokenizer,
        load_trained_config,
    )
    from tutorial_lib.models.meta import check_stored_weights, model_outline
    from tutorial_lib.models.side_files import check_side_files

    check_environment(config.run, config.parallel)
    if config.engine.shard_at_load:
        _LOG.warning("shard_at_load=True: this run cannot be resumed. %s.", NO_RESUME)
    config = apply_file(config.with_absolute_paths())
    if config.run.launcher != "ray" and config.run.device == "cuda":
        _check_gpus(config.run, config.parallel)
    if config.run.launcher == "local" or (config.run.launcher == "ray" and not ray_address()):
        _check_memory(config.parallel.world_size)
    m = config.model
    model = load_config(m.name, trust_remote_code=m.trust_remote_code)
    check_sequence_length(config.data.seq_length, model)
    _warn_of_router_loss(config, model)
    # Before the tokenizer is loaded, because a model for other tasks may have no tokenizer or vocabulary.
    untried = trial_forward(config, model)
    if untried and not joined_rank(config.run, config.parallel):
        _LOG.warning(untried)
    tokenizer = load_tokenizer(m.name, trust_remote_code=m.trust_remote_code)
    check_vocabulary(tokenizer, model)
    check_side_files(m.name)
    check_stored_weights(m, config.engine)
    if m.freeze or config.engine.activation_checkpointing:
        model_outline(m, config.engine)  # refuses a pattern that matches nothing, and a family that cannot recompute
    _check_states(config)
    if config.parallel.tp > 1:  # an output layer with its own weight is split as well
        model = load_trained_config(m.name, random_init=m.random_init, trust_remote_code=m.trust_remote_code)
    check_tensor_parallel(config.parallel.tp, model)
    if config.engine.name == "deepspeed":
        check_autotp(config.engine, config.parallel, model)
        if file := config.engine.deepspeed_file:
            check_leaf_modules(file, lambda: model_outline(m, config.engine))
            if config.run.launcher != "ray":  # Ray's workers may be on other machines
                check_outputs(file)
    check_storage(config)
    check_free(RunDirectory(config.directory), joined_rank(config.run, config.parallel) or 0)
    found = latest(RunDirectory(config.directory))
    has_data = reads_data(config.run, found)
    if found or has_data:
        config, note = choose_subset(config, read_trainer_state(found)["config"] if found else None)
        if note and not joined_rank(config.run, config.parallel):
            _LOG.warning(note)
    if has_data:
        warning = check_data(config.data, config.run, tokenizer)
        if warning and not joined_rank(config.run, config.parallel):
            _LOG.warning(warning)
        if config.run.score_answers:
            from tutorial_lib.trainer.answers import read_questions  # loads the model classes

            read_questions(config, tokenizer)
    if found:
        # Under Ray, the tokens may exist on the workers' machines only, so the workers compare them.
        compares = has_data and config.run.launcher != "ray"
        check_continues(
            config, found, (lambda: data_identity(config.data, config.run, tokenizer)) if compares else None
        )
    return config


def check_together(configs: Sequence[Config]) -> None:
    """Refuse runs that cannot share processes.

    Raises:
        ConfigError: names the setting in which they differ.
    """
    first = configs[0]
    if len(configs) > 1 and any(config.run.max_failures for config in configs):
        raise ConfigError(
            "max_failures works with a single run only; otherwise it would be unclear which run failed. "
            "Start them separately."
        )
    if len(configs) > 1 and any(config.run.min_dp for config in configs):
        raise ConfigError(
            "min_dp works with a single run only: each of several runs would continue with a different size. Start "
            "them separately."
        )
    for config in configs[1:]:
        for what in ("launcher", "device"):
            if getattr(config.run, what) != getattr(first.run, what):
                raise ConfigError(
                    f"Runs {first.run.name!r} and {config.run.name!r} differ in {what}: start them separately."
                )
        if config.parallel.world_size != first.parallel.world_size:
            raise ConfigError(
                f"Runs {first.run.name!r} and {config.run.name!r} need {first.parallel.world_size} and "
                f"{config.parallel.world_size} processes: start them separately."
            )
    if len({config.directory.resolve() for config in configs}) < len(configs):
        raise ConfigError("Two runs have the same name and storage: give each its own name.")


def _warn_of_router_loss(config: Config, model_config: PretrainedConfig) -> None:
    """Warn if config.json asks for the loss of the experts' router, which only the family's own loss function adds."""
    text = model_config.get_text_config()
    asked = getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 0)
    if asked and config.engine.name != "trainer" and not joined_rank(config.run, config.parallel):
        _LOG.warning(
            "The config.json of %r has output_router_logits=true, but engine=%r trains on the tokens' loss alone, "
            "without the router's. Write engine='trainer' to add it.",
            config.model.name,
            config.engine.name,
        )


def _check_gpus(run: RunConfig, parallel: ParallelConfig) -> None:
    import torch

    found = torch.cuda.device_count()
    needed = parallel.world_size if run.launcher == "local" else 1
    if found < needed:
        raise ConfigError(
            f"device='cuda' and {parallel.world_size} processes need {needed} GPUs here, but this machine has "
            f"{found}. Write profile='cpu', or a smaller dp. `python -m tutorial_lib doctor` shows what would run."
        )


def _check_states(config: Config) -> None:
    """Refuse model states that do not fit into this machine's memory, if a launcher starts all ranks here, on CPUs.

    Activations, buffers and unreduced gradients need memory too, depending on the batch and the point in the step. A
    third of the memory is reserved for them, which may be too little, so a run that passes may still be too large.
    """
    from tutorial_lib.engine.expected_states import expected_states, parameter_sizes

    is_here = config.run.launcher == "local" or (config.run.launcher == "ray" and not ray_address())
    if not is_here or config.run.device != "cpu":
        return
    states = expected_states(config, parameter_sizes(config.model, config.engine))
    if states is None:
        return
    ranks, held = config.parallel.world_size, sum(each.total for each in states) / 1e9
    to_start, available = ranks * MEMORY_TO_START_GB, available_memory_gb()
    if held > (1 - FREE_MEMORY_SHARE) * (available - to_start):
        on_ranks = plural(ranks, "rank", "ranks")
        where = " (offload moves nothing on a CPU)" if config.engine.offload != "none" else ""
        raise ConfigError(
            f"This run needs {held + to_start:.1f} GB of memory, and {available:.1f} GB are free here: {held:.1f} GB "
            f"for model states on {on_ranks}, and {to_start:.1f} GB to start; a third is reserved for activations "
            f"and buffers. Choose a smaller model, precision='bf16', or a higher ZeRO stage{where}; or close other "
            "programs. `python -m tutorial_lib plan` shows what would fit elsewhere."
        )


def _check_memory(world_size: int) -> None:
    """Refuse more processes than this machine has memory for: the kernel would kill some of them, or other programs."""
    available = available_memory_gb()
    possible = int(available / MEMORY_TO_START_GB)
    if world_size > possible:
        fewer = f"Write dp x tp of at most {possible}, close" if possible else "Close"
        raise ConfigError(
            f"{world_size} processes need about {world_size * MEMORY_TO_START_GB:.1f} GB of memory to start, but only "
            f"{available:.1f} GB are free here. {fewer} other programs, or raise the container's memory limit."
        )
