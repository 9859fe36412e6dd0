"""Result of a run: the content of ``result.json`` after a start of the run has ended."""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from tutorial_lib import checkpoint
from tutorial_lib.measure.memory import peak_memory
from tutorial_lib.mpu.collectives import all_gather_objects, broadcast_object
from tutorial_lib.mpu.device import device_name

if TYPE_CHECKING:
    from tutorial_lib.trainer.loop import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Result of one start of a run.

    Attributes:
        status: ``completed``, or ``stopped`` with steps left.
        stopped_by: a signal's name, ``request``, ``stop_after``, or None.
        step: number of optimizer steps done, of ``num_steps`` in total.
        resumed_from: step of the checkpoint that this start resumed from; ``reshaped_from`` is the shape it had.
        left_out: newer checkpoints that are damaged.
        restarts: failures of this launch before this start.
        data: summary of tokenising each split; for ``eval`` also ``num_trained_on``, the number of its rows that are in
            ``train``, too.
        train_loss: loss of the last step.
        eval_loss_before: evaluation loss before the first step; ``eval_loss`` is the one at the end, and
            ``eval_losses`` are those that ``evaluate_every`` asked for.
        tokens_per_second: speed of this start without its first step, which allocates and compiles.
        saves: seconds and bytes of each save of this start.
        ranks: each rank's device, the number of ranks on its node, its peak memory, and its probe's measurements of a
            step, by this start or by an earlier one with the same settings.
        facts: extra entries that only some kinds of training have, by name.
    """

    status: str
    stopped_by: str | None
    step: int
    num_steps: int
    steps_per_epoch: int | None
    resumed_from: int | None
    reshaped_from: dict[str, Any] | None
    left_out: list[dict[str, Any]]
    restarts: list[dict[str, Any]]
    data: dict[str, Any]
    train_loss: float | None
    eval_loss_before: float | None
    eval_loss: float | None
    eval_losses: list[dict[str, Any]]
    eval_samples_per_second: float | None
    tokens_per_second: float | None
    seconds_to_first_step: float
    num_parameters: int
    checkpoint: str
    saves: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    versions: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of ``result.json``."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "facts"}
        return json.dumps(own | self.facts, indent=2) + "\n"


def collect_result(trainer: Trainer, eval_loss: float | None, facts: dict[str, Any]) -> Result:
    """Collect the result of one start of a run; the caller writes only rank 0's. Collective.

    Args:
        trainer: the trainer that has just finished.
        eval_loss: evaluation loss after the last step, or None.
        facts: extra entries, see :class:`Result`.
    """
    rows, record, checkpoints = trainer.run.rows(), trainer.checkpoints.record, trainer.checkpoints
    steady = [row for row in rows if row["step"] > (trainer.resumed_from or 0) + 1]
    seconds = sum(row["seconds"] for row in steady)
    loaders: dict[str, Any] = {"train": trainer.loader, "eval": trainer.evaluator and trainer.evaluator.loader}
    data = {use: asdict(loader.summary) for use, loader in loaders.items() if hasattr(loader, "summary")}
    if trainer.evaluator:
        is_copy = data["eval"]["sha256"] == data.get("train", {}).get("sha256")
        data["eval"]["num_trained_on"] = data["eval"]["num_rows"] if is_copy else loaders["eval"].num_trained_on
    measured_before = broadcast_object(trainer.records.measured_before)
    own = {
        "rank": trainer.topology.rank,
        "device": device_name(trainer.engine.device),
        "ranks_on_node": int(os.environ.get("LOCAL_WORLD_SIZE", trainer.topology.dp * trainer.topology.tp)),
        "peak_memory_bytes": peak_memory(trainer.engine.device),
        "measured": trainer.measured or (measured_before and measured_before[trainer.topology.rank]),
    }
    packages = ("torch", "deepspeed", "transformers", "datasets")
    return Result(
        status="completed" if trainer.stops.stopped_by is None else "stopped",
        stopped_by=trainer.stops.stopped_by,
        step=trainer.steps_done,
        num_steps=trainer.num_steps,
        steps_per_epoch=getattr(trainer.loader, "steps_per_epoch", None),
        resumed_from=trainer.resumed_from,
        reshaped_from=checkpoints.reshaped_from,
        left_out=[asdict(each) for each in checkpoints.start.left_out],
        restarts=trainer.records.restarts,
        data=data,
        train_loss=rows[-1]["loss"] if rows else None,
        eval_loss_before=record.get("eval_loss_before"),
        eval_loss=eval_loss,
        eval_losses=record.get("eval_losses", []),
        eval_samples_per_second=trainer.evaluator.samples_per_second if trainer.evaluator else None,
        tokens_per_second=sum(row["tokens"] for row in steady) / seconds if seconds else None,
        seconds_to_first_step=record["seconds_to_first_step"],
        num_parameters=trainer.engine.num_parameters,
        checkpoint=checkpoint.directory_of(trainer.run, trainer.steps_done).name,
        saves=checkpoints.saves,
        ranks=all_gather_objects(own),
        versions={name: importlib.metadata.version(name) for name in packages},
        facts=facts,
    )
