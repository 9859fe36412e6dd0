"""Our own runs on a GPU (docs/measured/h200), with today's predictions beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.activation_memory import ONE_BILLION
from tutorial_lib.config import Config
from tutorial_lib.engine.predictions import states_and_peak, workload_and_layout
from tutorial_lib.models.dimensions import from_config, read_config
from tutorial_lib.theory import peak_memory
from tutorial_lib.theory.cost import evaluate
from tutorial_lib.theory.dimensions import Dimensions
from tutorial_lib.theory.layouts import Cluster, Layout, Workload
from tutorial_lib.theory.state_bytes import layout_states

DIRECTORY = Path(__file__).parents[2] / "docs" / "measured" / "h200"
PRESET = "h200"
WORKSPACE = 64 * 2**20
"""Bytes of cuBLAS's two workspaces with ``CUBLAS_WORKSPACE_CONFIG=:4096:8``, which no plan counts."""

_MODELS = {"bloom-560m": "published/bloom-560m", "gpt2": "embedded/gpt2-small"}


@dataclass(frozen=True)
class GpuRun:
    """A run, with its memory in bytes and the seconds of a step, predicted and measured.

    Attributes:
        name: model and engine.
        states: bytes of all model states just before the update; None if they were not counted.
        peak: bytes that a step added to what existed before it; if states were not counted, all bytes in use.
        seconds: seconds of a step.
        peaks_at_update: whether the measured peak is AdamW's copy, which the engine no longer makes.
        is_fitted: whether the GPU waits for launches, whose times in the planner were fitted to runs like this one.
    """

    name: str
    states: tuple[float, float] | None
    peak: tuple[float, float]
    seconds: tuple[float, float]
    peaks_at_update: bool = False
    is_fitted: bool = False

    @property
    def peak_error(self) -> float:
        return self.peak[0] / self.peak[1] - 1

    @property
    def times_too_fast(self) -> float:
        """Return measured over predicted seconds per step, which is 2 if a step takes twice as long as predicted."""
        return self.seconds[1] / self.seconds[0]


def measured(file: str) -> Any:
    """Return the measurements of a file of docs/measured/h200."""
    return json.loads((DIRECTORY / f"{file}.json").read_text(encoding="utf-8"))["measured"]


def workshop_runs() -> Iterator[GpuRun]:
    """Yield the workshop's models under plain torch and DeepSpeed's stages."""
    for row in measured("workshop"):
        workload, layout = _planned(row)
        states, peak = states_and_peak(workload, layout, _config(row).accumulation)
        waiting = states.gradients if layout.offload != "none" else 0.0  # before the update they are on the host
        yield GpuRun(
            row["case"],
            (states.device - waiting + states.host, row["states_bytes"]["total"]),
            (peak, row["step_peak_bytes"]),
            (evaluate(workload, Cluster.of(PRESET, 1, "bf16"), layout).seconds, row["step_seconds"]["median"]),
            is_fitted=layout.micro_batch == 4 and layout.offload == "none",
        )


def update_errors() -> Iterator[float]:
    """Yield the relative error of the predicted peak of an update, where it was measured by itself."""
    for row in measured("workshop"):
        if "phase_peak_bytes" in row:
            workload, layout = _planned(row)
            part = peak_memory.part_of_model(workload.dimensions, workload.num_params)
            accumulation = row["settings"]["global_batch"] // row["settings"]["micro_batch"]
            states = layout_states(workload, layout, part.params, accumulation, 1)
            *_, update = peak_memory.phase_peaks(workload, layout, part, states, accumulation)
            yield update.total / (row["phase_peak_bytes"]["update"] - WORKSPACE) - 1


def _planned(row: dict[str, Any]) -> tuple[Workload, Layout]:
    config = _config(row)
    return workload_and_layout(config, *read_config(config.model.name))


def _config(row: dict[str, Any]) -> Config:
    model = _MODELS[row["case"].partition(":")[0]]
    return Config.create("gpu", **{"model": model, "random_init": True, **row["settings"]})


def fsdp_runs() -> Iterator[GpuRun]:
    """Yield FSDP2's runs of a model with about 1 B parameters, by micro-batch, with and without recomputation."""
    dimensions = one_billion()
    for table in measured("fsdp2-one-billion"):
        recomputed = table["activation_checkpointing"]
        for row in table["rows"]:
            size = row["micro_batch"]
            config = Config.create(
                "gpu", engine="fsdp", micro_batch=size, global_batch=size, seq_length=ONE_BILLION["n_positions"],
                activation_checkpointing=recomputed,
            )  # fmt: skip
            workload, layout = workload_and_layout(config, dimensions, table["num_params"])
            states, peak = states_and_peak(workload, layout, config.accumulation)
            copy = 20 * table["num_params"]  # weights, gradients, moments, and AdamW's copy of the weights' size
            yield GpuRun(
                f"micro-batch {size}{', recomputed' if recomputed else ''}",
                None,
                (states.device - states.gradients + peak, row["allocator_peak_bytes"]),
                (evaluate(workload, Cluster.of(PRESET, 1, "bf16"), layout).seconds, row["step_seconds"]),
                peaks_at_update=abs(row["allocator_peak_bytes"] - copy) < 2 * WORKSPACE,
                is_fitted=size < 16,
            )


def one_billion() -> Dimensions:
    """Return the dimensions of the model with about 1 B parameters."""
    from transformers import GPT2Config

    values: dict[str, Any] = {**ONE_BILLION, "bos_token_id": None, "eos_token_id": None}
    return from_config(GPT2Config(**values))
