"""Evaluation during training: the mean loss per token over the evaluation split, and its schedule."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.config import RunConfig
from tutorial_lib.dataloader import Batch, EvalLoader
from tutorial_lib.dataloader.collate import fingerprint
from tutorial_lib.engine import Engine
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import all_gather_ints
from tutorial_lib.trainer.loss import count_targets, sum_over_ranks, token_loss_sum
from tutorial_lib.trainer.rank_agreement import check_batches


class Evaluator:
    """Evaluates a model, and keeps the losses in the run's record, which checkpoints save.

    Args:
        run: says how often to evaluate.
        engine: the engine that holds the model.
        loader: loader of the evaluation split.
        topology: this rank's place in the grid.
        steps_per_epoch: optimizer steps per epoch, for ``evaluate_every='epoch'``.
        score: function that computes further scores by name, with the model in evaluation mode. Collective.

    Attributes:
        samples_per_second: speed at which the last evaluation computed its loss, or None before the first.
        scores: other scores of the last evaluation: those of ``score``, and ``all_tokens``, the mean loss over all
            tokens, including prompts. The latter is missing if labels mask no prompt, if rows are packed, or if the
            engine computes the loss itself, in chunks.
    """

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        loader: EvalLoader,
        topology: Topology,
        steps_per_epoch: int,
        score: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.engine, self.loader, self.topology = engine, loader, topology
        self.samples_per_second: float | None = None
        self.scores: dict[str, float] = {}
        self._score = score
        self._evaluated_at: int | None = None
        self._every, self._steps_per_epoch = run.evaluate_every, steps_per_epoch

    def mean_loss(self, step: int) -> float:
        """Return the mean loss per token, with the same weight for every token, on all ranks. Collective.

        Args:
            step: number of optimizer steps done, for messages.
        """
        began = time.perf_counter()
        self.engine.train(False)
        totals = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        with torch.no_grad():
            for batch in self.loader:
                if self.topology.tp > 1:
                    own = all_gather_ints([fingerprint([batch])])
                    check_batches(self.topology, step + 1, [number for (number,) in own])
                logits = self.engine.forward(batch)
                totals[0] += token_loss_sum(logits, batch["labels"])
                totals[1] += count_targets(batch["labels"])
                unmasked = _unmasked_labels(batch)
                if unmasked is not None and logits.dim() > 0:
                    totals[2] += token_loss_sum(logits, unmasked)
                    totals[3] += count_targets(unmasked)
        loss_sum, tokens, all_sum, all_tokens = (sum_over_ranks(each, self.topology, step=step + 1) for each in totals)
        self.samples_per_second = self.loader.num_examples / (time.perf_counter() - began)
        self.scores = {"all_tokens": all_sum / all_tokens} if all_tokens > tokens else {}
        if self._score:
            self.scores |= self._score()
        self._evaluated_at = step
        return loss_sum / tokens

    def note_before(self, record: dict[str, Any]) -> None:
        """Evaluate the model before training. Collective."""
        record["eval_loss_before"] = self.mean_loss(0)

    def evaluate_if_due(self, record: dict[str, Any], step: int) -> None:
        """Add this step's evaluation loss to ``eval_losses``, if ``evaluate_every`` asks for it. Collective."""
        if self._every is None:
            return
        losses: list[dict[str, Any]] = record.setdefault("eval_losses", [])
        period = self._steps_per_epoch if self._every == "epoch" else int(self._every)
        if step % period == 0 and _recorded_loss(record, step) is None:
            loss = record["eval_loss_before"] if step == 0 else self.mean_loss(step)
            losses.append({"epoch": step / self._steps_per_epoch, "step": step, "loss": loss, **self.scores})

    def loss_at(self, record: dict[str, Any], step: int) -> float:
        """Return the evaluation loss after the last step, evaluating now unless it is recorded. Collective."""
        recorded = _recorded_loss(record, step)
        return self.mean_loss(step) if recorded is None else recorded

    def scores_at(self, step: int) -> dict[str, float]:
        """Return the other scores after the last step, evaluating now if this start did not. Collective."""
        if self._evaluated_at != step:
            self.mean_loss(step)
        return self.scores


def _unmasked_labels(batch: Batch) -> Tensor | None:
    """Return labels (B, S) that count every token, or None for packed rows."""
    mask = batch["attention_mask"]
    if mask.dim() > 2:
        return None
    is_placeholder = not (batch["labels"] != -100).any()  # this rank has no real batch here
    return batch["labels"] if is_placeholder else batch["input_ids"].masked_fill(mask == 0, -100)


def _recorded_loss(record: dict[str, Any], step: int) -> float | None:
    """Return the evaluation loss recorded for this step, or None if ``evaluate_every`` did not ask for one."""
    last = next(iter(record.get("eval_losses", [])[-1:]), None)
    return last["loss"] if last and last["step"] == step else None
