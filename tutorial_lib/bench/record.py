"""Record of a row in ``matrix.json``: the cost of one run of a matrix, or the reason why it did not finish."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutorial_lib.config import Config, ParallelConfig, RunConfig
from tutorial_lib.doctor.machine import usable_cores
from tutorial_lib.launch import Run
from tutorial_lib.measure.memory_log import MemoryLogError, MemorySummary, read_memory_log
from tutorial_lib.records import typical_rows
from tutorial_lib.theory.memory import ModelStates

NOT_RUN, DONE, STOPPED = "not run", "done", "stopped"
FAILED, KILLED, OUT_OF_MEMORY, REFUSED = "failed", "killed", "out of memory", "refused"
"""Values of a row's status; the last four mean that it has failed."""


@dataclass(frozen=True, slots=True)
class RowRecord:
    """One row of a matrix. Values that were not measured are None.

    Attributes:
        name: name of the row.
        status: :data:`NOT_RUN`, :data:`DONE`, :data:`STOPPED`, or the kind of failure.
        cause: why the row is not done, in one line.
        error: the complete error.
        settings: settings in which rows of a matrix may differ; in a done row, with the values of its DeepSpeed file.
        wall_seconds: time from just before the run's processes started until all of them had ended.
        train_seconds: time of all optimizer steps together.
        step_seconds: median time of a step, without the first one and the one slowed by ``measure``.
        samples_per_second: sequences trained per second in typical steps, over all ranks.
        tokens_per_second: tokens trained per second in typical steps, over all ranks.
        eval_samples_per_second: speed of the last evaluation.
        train_loss: loss of the last step.
        eval_losses: evaluation losses, one each time ``evaluate_every`` asks for one, otherwise only at the end.
        steps_per_epoch: optimizer steps of one pass over the training rows.
        num_steps: optimizer steps of the run.
        num_parameters: number of parameters of the model.
        world_size: number of processes.
        process_tree: host memory of the launching process and all its descendants.
        gpu: memory of the fullest GPU; None without a GPU.
        gpus: memory of every GPU.
        states: bytes of each rank's model states, counted tensor by tensor in one step.
        device_states: bytes of each rank's model states that are on a GPU.
        predicted_states: predicted bytes of model states for each data-parallel rank.
        predicted_device_states: the part of the predicted states that stays on the device despite offload.
        peak_bytes: the most that any rank held at one time during a step, beyond what existed before the step.
        predicted_peak_bytes: the planner's prediction for ``peak_bytes``; None if it has none for this kind of run.
        predicted_step_seconds: the planner's prediction for ``step_seconds``; None if no preset describes the devices.
        note: remark about these numbers.
    """

    name: str
    status: str = NOT_RUN
    cause: str | None = None
    error: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    wall_seconds: float | None = None
    train_seconds: float | None = None
    step_seconds: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    eval_samples_per_second: float | None = None
    train_loss: float | None = None
    eval_losses: tuple[float, ...] = ()
    steps_per_epoch: int | None = None
    num_steps: int | None = None
    num_parameters: int | None = None
    world_size: int | None = None
    process_tree: MemorySummary | None = None
    gpu: MemorySummary | None = None
    gpus: tuple[MemorySummary, ...] = ()
    states: tuple[ModelStates, ...] = ()
    device_states: tuple[int, ...] = ()
    predicted_states: tuple[ModelStates, ...] = ()
    predicted_device_states: tuple[ModelStates, ...] = ()
    peak_bytes: int | None = None
    predicted_peak_bytes: float | None = None
    predicted_step_seconds: float | None = None
    note: str | None = None

    @property
    def is_done(self) -> bool:
        return self.status == DONE

    @property
    def has_failed(self) -> bool:
        return self.status in (FAILED, KILLED, OUT_OF_MEMORY, REFUSED)

    @property
    def states_bytes(self) -> int | None:
        """Largest model states of any rank, in bytes."""
        return max((each.total for each in self.states), default=None)

    @property
    def predicted_bytes(self) -> int | None:
        """Prediction for :attr:`states_bytes`."""
        return max((each.total for each in self.predicted_states), default=None)

    @property
    def error_percent(self) -> float | None:
        """Difference of the measured states from the predicted ones, in percent."""
        measured, predicted = self.states_bytes, self.predicted_bytes
        return None if measured is None or not predicted else 100 * (measured / predicted - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the row, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> RowRecord:
        """Build a row from the result of :meth:`to_dict`."""
        values = dict(given)
        for name in ("process_tree", "gpu"):
            values[name] = _memory(values[name])
        values["gpus"] = tuple(_memory(each) for each in values["gpus"])
        for name in ("states", "predicted_states", "predicted_device_states"):
            values[name] = tuple(ModelStates(**each) for each in values[name])
        for name in ("eval_losses", "device_states"):
            values[name] = tuple(values[name])
        return cls(**values)


def _memory(given: dict[str, Any] | None) -> Any:
    return given and MemorySummary(**{**given, "modes": tuple(given["modes"])})


def variant_of(config: Config) -> dict[str, Any]:
    """Return the settings in which rows of a matrix may differ, by flat name."""
    flat = config.flat()
    names = ("engine", "dp", "tp", "zero_stage", "sharding", "offload", "pin_memory", "deepspeed", "global_batch")
    return {name: flat[name] for name in names}


def measure_row(name: str, run: Run, log: Path, *, wall_seconds: float) -> RowRecord:
    """Return the record of a completed run.

    Args:
        name: name of the row.
        run: the run.
        log: the sampler's log of the run.
        wall_seconds: the run's duration, including the start of its processes.
    """
    from tutorial_lib.engine.expected_states import expected_states, on_device, parameter_sizes
    from tutorial_lib.engine.predictions import predict_step_peak, predict_step_seconds

    config, result = run.config, run.result
    steady, note = _steady_steps(run)
    seconds = sum(row["seconds"] for row in steady)
    tree, gpus = _sampled(log, config.run)
    measured = [rank["measured"] for rank in result["ranks"]]
    predicted = tuple(expected_states(config, parameter_sizes(config.model, config.engine)) or ())
    accounts = [each["state_bytes"] for each in measured if each]
    return RowRecord(
        name=name,
        status=DONE,
        settings=variant_of(config),
        wall_seconds=wall_seconds,
        train_seconds=sum(row["seconds"] for row in run.rows),
        step_seconds=statistics.median(row["seconds"] for row in steady) if steady else None,
        samples_per_second=config.run.global_batch * len(steady) / seconds if steady else None,
        tokens_per_second=sum(row["tokens"] for row in steady) / seconds if steady else None,
        eval_samples_per_second=result["eval_samples_per_second"],
        train_loss=result["train_loss"],
        eval_losses=_eval_losses(result),
        steps_per_epoch=result.get("steps_per_epoch"),
        num_steps=result["num_steps"],
        num_parameters=result["num_parameters"],
        world_size=config.parallel.world_size,
        process_tree=tree,
        gpu=max(gpus, key=lambda each: each.peak, default=None),
        gpus=gpus,
        states=tuple(ModelStates(each["parameters"], each["gradients"], each["optimizer"]) for each in accounts),
        device_states=tuple(each["by_device"].get("cuda", 0) for each in accounts),
        predicted_states=predicted,
        predicted_device_states=tuple(on_device(config.engine, each) for each in predicted),
        peak_bytes=max((sum(each["peak_bytes"].values()) for each in measured if each), default=None),
        predicted_peak_bytes=predict_step_peak(config),
        predicted_step_seconds=predict_step_seconds(config, result["ranks"]),
        note="; ".join(filter(None, (note, _shared_cores(config.run, config.parallel)))) or None,
    )


def _steady_steps(run: Run) -> tuple[Sequence[dict[str, Any]], str | None]:
    """Return the metrics rows of typical steps, and a remark about them or None."""
    steady = typical_rows(run.result, run.rows)
    after_first = [row for row in run.rows if row["step"] > 1]
    if steady or not after_first:
        return steady, None if steady else "no speed: the only step also allocates memory"
    measured = (run.result["ranks"][0]["measured"] or {}).get("step")
    return after_first, f"speed of step {measured}, which counting memory and traffic slowed down: run more steps"


def _shared_cores(run: RunConfig, parallel: ParallelConfig) -> str | None:
    """Return a remark if ranks had to share cores, or None."""
    cores, ranks = usable_cores(), parallel.world_size
    if run.device != "cpu" or run.launcher != "local" or ranks <= cores:
        return None
    return f"{ranks} processes share {cores} cores"


def _eval_losses(result: dict[str, Any]) -> tuple[float, ...]:
    by_epoch = tuple(each["loss"] for each in result["eval_losses"] if each["step"] > 0)
    return by_epoch or (() if result["eval_loss"] is None else (result["eval_loss"],))


def _sampled(log: Path, run: RunConfig) -> tuple[MemorySummary | None, tuple[MemorySummary, ...]]:
    """Return the memory of the process tree, and of each GPU if the run used any."""
    try:
        series = {each.label: each for each in read_memory_log(log).series}
    except MemoryLogError:
        return None, ()
    names = sorted({f"GPU {each.gpu}" for each in series.values() if each.gpu is not None})
    # Use the share of these processes if the driver reports it, and otherwise the GPU's total.
    gpus = [series.get(f"{name}, process tree", series[name]) for name in names]
    on_gpu = run.device == "cuda"
    return series["process tree"].summary(), tuple(each.summary() for each in gpus) if on_gpu else ()
