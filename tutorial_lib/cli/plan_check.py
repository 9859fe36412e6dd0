"""Command ``plan --check RUN``: predictions for a run next to the measurements of ``train --measure``.

The run's records hold its settings (``config.json``) and the measurements of one step (``result.json``). This module
compares the bytes of model states, the peak of the step's allocations beyond existing states, and the bytes on the
wire. Time is only compared if a GPU preset says how fast the devices are; there is no preset for a shared CPU.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.records import RunDirectory, typical_rows
from tutorial_lib.tables import align
from tutorial_lib.theory import memory
from tutorial_lib.theory.cost import evaluate
from tutorial_lib.theory.layouts import Cluster, Layout, Workload
from tutorial_lib.theory.state_bytes import States


@dataclass(frozen=True, slots=True)
class Compared:
    """One quantity of a run: predicted, and measured on the rank where it is largest."""

    quantity: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative difference of the prediction from the measurement; positive if the prediction is higher."""
        return self.predicted / self.measured - 1 if self.measured else 0.0


def describe_predictions(run: str, *, gpu: str | None = None, as_json: bool = False) -> str:
    """Return the comparison as a table, or as JSON.

    Args:
        run: directory of the run.
        gpu: preset of the GPU that it ran on, to compare time as well.
        as_json: return JSON instead of a table.

    Raises:
        ConfigError: the run is unfinished or was not measured, its model cannot be planned, or ``gpu`` is not a preset.
    """
    records = RunDirectory(Path(run).expanduser())
    try:
        config, result = Config.from_json(records.config_file.read_text(encoding="utf-8")), records.result()
    except FileNotFoundError as error:
        raise ConfigError(f"{run} has no {Path(error.filename).name}: name the directory of a finished run.") from error
    measured = [rank["measured"] for rank in result["ranks"]]
    if not all(measured):
        raise ConfigError(f"{run} was not measured: train it with --measure, as a new run if no steps are left.")
    seconds = [row["seconds"] for row in typical_rows(result, records.rows())]
    rows = compare_predictions(
        config, measured, gpu=gpu, seconds=statistics.median(seconds) if seconds else None,
        gpus_per_node=min(rank["ranks_on_node"] for rank in result["ranks"]),
    )  # fmt: skip
    if as_json:
        return json.dumps([{**asdict(row), "error": row.error} for row in rows], indent=2)
    lines = [f"{run}: {config.engine.name}, dp={config.parallel.dp} tp={config.parallel.tp}, {config.model.name}"]
    header = ("", "predicted", "measured", "error")
    cells = [(row.quantity, f"{row.predicted:,.4g}", f"{row.measured:,.4g}", f"{row.error:+.1%}") for row in rows]
    lines += align([header, *cells], (False, True, True, True), least=(32, 14, 14, 7))
    if config.data.batching == "longest":
        lines.append(f"Rows are padded to the longest in a batch: {config.data.seq_length} tokens are an upper bound.")
    return "\n".join(lines)


def compare_predictions(
    config: Config, measured: list[dict[str, Any]], *, gpu: str | None = None, seconds: float | None = None,
    gpus_per_node: int | None = None,
) -> list[Compared]:  # fmt: skip
    """Compare the quantities of a run.

    Args:
        config: settings of the run.
        measured: each rank's measurements.
        gpu: preset of the GPU that it ran on.
        seconds: time of a step.
        gpus_per_node: devices that it used on each node; None if all were on one node.
    """
    from tutorial_lib.engine.predictions import states_and_peak, workload_and_layout
    from tutorial_lib.models.dimensions import read_config

    workload, layout = workload_and_layout(config, *read_config(config.model.name))
    ranks = config.parallel.world_size
    states, peak = states_and_peak(workload, layout, config.accumulation)
    cluster = _cluster_of(gpu, ranks, config.engine.precision, gpus_per_node or ranks)
    candidate = evaluate(workload, cluster, layout)
    rows = [
        Compared(
            "model states, bytes",
            states.device
            + states.host
            + _boundary_gradients(config, workload, layout)
            - _later_gradients(layout, states),
            max(m["state_bytes"]["total"] for m in measured),
        ),
        Compared(
            "peak beyond weights and moments",
            peak,
            max(sum(m["peak_bytes"].values()) for m in measured),
        ),
        Compared(
            "bytes sent per step and rank",
            candidate.dp_traffic + candidate.tp_traffic,
            max(m["traffic"]["wire_bytes"] for m in measured),
        ),
    ]
    if gpu and seconds:
        rows.append(Compared("seconds per step", candidate.seconds, seconds))
    return rows


def _cluster_of(gpu: str | None, ranks: int, precision: str, gpus_per_node: int) -> Cluster:
    """Return the devices of a preset, or arbitrary ones if only bytes are compared.

    Raises:
        ConfigError: there is no such preset, or the device does not support that precision.
    """
    if gpu is None:
        return Cluster(gpus=ranks, gpus_per_node=gpus_per_node, gpu_memory=80e9)
    try:
        return Cluster.of(gpu, ranks, precision, gpus_per_node=gpus_per_node)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _boundary_gradients(config: Config, workload: Workload, layout: Layout) -> float:
    """Return the extra bytes of gradients that ZeRO's stages 1 and 2 hold at boundaries of the ranks' shares.

    A tensor that crosses a boundary is held in full on both ranks
    (:func:`tutorial_lib.theory.memory.reduced_gradients`). This is negligible in a large model, and about one percent
    in a model of four layers.
    """
    is_reduced = layout.zero_stage == 2 or (layout.zero_stage == 1 and config.accumulation == 1)
    if layout.strategy or not is_reduced or layout.tp > 1 or layout.offload != "none":
        return 0.0
    from tutorial_lib.models.meta import model_outline

    outline = model_outline(replace(config.model, random_init=True), config.engine)
    sizes = [p.numel() for p in outline.parameters() if p.requires_grad]
    held = max(memory.reduced_gradients(sizes, layout.dp, rank) for rank in range(layout.dp))
    return (held - memory.partition_elements(sum(sizes), layout.dp)) * workload.bytes_per_element


def _later_gradients(layout: Layout, states: States) -> float:
    """Return the bytes of reduced gradients on the host that do not exist yet while full ones wait on the device.

    A plan counts both, since the device must have room for one and the host for the other. FSDP2 with offload never
    holds both at once.
    """
    if layout.strategy is None or layout.offload == "none" or not states.gradients:
        return 0.0
    return 4 * memory.partition_elements(int(states.gradients) // 4, layout.shard_size or layout.dp)
