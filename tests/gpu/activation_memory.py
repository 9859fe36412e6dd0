"""Step 4: FSDP2's peak memory by micro-batch until memory runs out, without and with activation checkpointing.

The model has about 1 B parameters and a vocabulary of 32,000 tokens, so that layers, not logits, hold most of the
activations as long as no layer is checkpointed. One engine serves all sizes. Each row is one warm-up step and one
timed step at one micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.gpu.cases import Cases, Setting, clear_memory
from tests.gpu.older_versions import adapt
from tests.gpu.training import engine_of, full_rows, time_steps, write_model
from tests.gpu.workshop import Model, configure, measured_peak, predict, utilisations
from tutorial_lib.engine import Engine
from tutorial_lib.measure.memory import peak_memory, reset_peak_memory

ONE_BILLION = {"n_embd": 2048, "n_layer": 18, "n_head": 16, "vocab_size": 32_000, "n_positions": 1024}
TINY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 2048, "n_positions": 32}
MICRO_BATCHES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def cases(setting: Setting) -> Cases:
    """Return this module's measurements."""
    return {
        "without activation checkpointing": lambda: raise_micro_batch(setting, checkpointing=False),
        "with activation checkpointing": lambda: raise_micro_batch(setting, checkpointing=True),
    }


def one_billion(setting: Setting) -> Model:
    """Return the model of about 1 B parameters."""
    dimensions = TINY if setting.tiny else ONE_BILLION
    return Model(write_model(setting, "one-billion", "embedded/gpt2", **dimensions), dimensions["n_positions"])


def raise_micro_batch(setting: Setting, *, checkpointing: bool) -> dict[str, Any]:
    """Train with larger and larger micro-batches, and return the peak of each and the first that did not fit."""
    adapted = adapt()
    model = one_billion(setting)
    measured_peak(setting)  # now, while there is memory for it
    sizes = setting.pick(full=MICRO_BATCHES, quick=MICRO_BATCHES[1::2], tiny=(1, 2))
    rows: list[dict[str, Any]] = []
    too_large = None
    config = configure(setting, model, engine="fsdp", activation_checkpointing=checkpointing)
    with engine_of(config, setting) as engine:
        for size in sizes:
            sized = config.override(micro_batch=size, global_batch=size)
            engine.config = sized  # type: ignore[attr-defined]  # sets the micro-batches per step
            row = try_size(setting, engine, sized, model)
            if row is None:
                too_large = size
                break
            rows.append(row)
        params = engine.num_parameters
    return {
        "num_params": params,
        "activation_checkpointing": checkpointing,
        "adapted_to_older_versions": adapted,
        "rows": rows,
        "largest_that_fitted": rows[-1]["micro_batch"] if rows else None,
        "first_out_of_memory": too_large,
    }


def try_size(setting: Setting, engine: Engine, config: Any, model: Model) -> dict[str, Any] | None:
    """Return a row of the table, or None if the device runs out of memory."""
    clear_memory()
    reset_peak_memory(engine.device)
    try:
        batches = full_rows(model.dimensions.vocabulary, config, engine.device)
        (_, seconds), _ = time_steps(engine, batches, 2)
    except torch.OutOfMemoryError:
        return None
    tokens_per_second = config.run.global_batch * config.data.seq_length / seconds
    return {
        "micro_batch": config.micro_batch,
        "allocator_peak_bytes": peak_memory(engine.device),
        "step_seconds": seconds,
        "tokens_per_second": tokens_per_second,
        **utilisations(setting, model.dimensions, engine.num_parameters, model.seq_length, tokens_per_second),
        "predicted": predict(config, model.dimensions, engine.num_parameters),
    }
