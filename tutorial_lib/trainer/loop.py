"""Training loop for any engine, with everything a long run needs: evaluation, records, stop requests and a probe.

Without these it is the same loop as in ``notebooks/scripts/train_zero.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checkpoint import CheckpointManager
from tutorial_lib.checkpoint.directory import finish_deletions
from tutorial_lib.checkpoint.manager import OnCheckpoint
from tutorial_lib.checkpoint.start import Start, find_start
from tutorial_lib.config import Config, RunConfig
from tutorial_lib.dataloader import build_eval_loader, build_train_loader, data_identity
from tutorial_lib.engine import build_engine
from tutorial_lib.measure.memory import reset_peak_memory
from tutorial_lib.models import load_tokenizer
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import barrier
from tutorial_lib.mpu.device import local_device
from tutorial_lib.records import RunDirectory, write_atomically
from tutorial_lib.trainer.evaluation import Evaluator
from tutorial_lib.trainer.loss import NonFiniteLoss, count_tokens, sum_over_ranks, token_loss_sum
from tutorial_lib.trainer.metrics import Records, StepRow
from tutorial_lib.trainer.result import Result, collect_result
from tutorial_lib.trainer.step_probe import StepProbe, measured_step
from tutorial_lib.trainer.stops import StopRequests


class Trainer:
    """One start of a run on one rank: from the newest checkpoint, or step 0, to the end or a stop.

    Args:
        config: what to run.
        topology: this rank's place in the grid.
        on_checkpoint: called when a checkpoint is complete.
        stop_signalled: returns the number of the signal that asked this process to stop, or 0.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        *,
        on_checkpoint: OnCheckpoint | None = None,
        stop_signalled: Callable[[], int] = lambda: 0,
    ) -> None:
        self.config, self.topology, self.run = config, topology, RunDirectory(config.directory)
        reset_peak_memory(local_device(config.run))
        self.stops = StopRequests(self.run, topology, config.run.stop_after, stop_signalled)
        self.records = Records(config, topology)
        self.measured: dict[str, Any] | None = None
        self.build(on_checkpoint)
        self.steps_done = self.checkpoints.restore()
        self.resumed_from = self.steps_done if self.checkpoints.start.found else None
        self.measured_step = measured_step(self.steps_done, self.loader.last_step) if config.run.measure else None
        self.records.resume(self.steps_done)

    def build(self, on_checkpoint: OnCheckpoint | None) -> None:
        """Build the loaders, the engine, and the checkpoint manager. Collective."""
        config, topology = self.config, self.topology
        self.tokenizer = load_tokenizer(config.model.name, trust_remote_code=config.model.trust_remote_code)
        start = find_start(config, topology, partial(data_identity, config.data, config.run, self.tokenizer))
        loader: Any = self.build_loader() if start.reads_data else _NoData(config.run, start)
        self.loader = loader
        self.num_steps: int = self.loader.num_steps
        self.engine: Any = self.build_engine()
        self.evaluator: Evaluator | None = None
        if config.run.evaluate:
            eval_loader = build_eval_loader(config, self.tokenizer, topology)
            self.evaluator = Evaluator(
                config.run, self.engine, eval_loader, topology, self.loader.steps_per_epoch, self.build_score()
            )
        self.checkpoints = CheckpointManager(
            config,
            self.engine,
            self.loader,
            topology,
            start=start,
            evaluate=self._evaluate_for_best,
            on_checkpoint=on_checkpoint,
        )

    def build_loader(self) -> Any:
        """Return the loader of the training split."""
        return build_train_loader(self.config, self.tokenizer, self.topology)

    def build_engine(self) -> Any:
        """Return the engine: the model with its optimizer and schedule. Collective."""
        return build_engine(self.config, self.topology, self.num_steps)

    def build_score(self) -> Callable[[], dict[str, float]] | None:
        """Return a function that computes more scores with each evaluation, or None."""
        return None

    def fit(self, started: float | None = None) -> Result:
        """Evaluate, train to the end or until asked to stop, save, and evaluate again. Collective.

        Args:
            started: ``time.perf_counter()`` when this start began, for ``seconds_to_first_step``; default: now.
        """
        self._began = time.perf_counter() if started is None else started
        self.records.begin(is_resumed=self.resumed_from is not None)
        self._train_steps()
        # A run that resumes in a different shape and stops at once still saves a checkpoint in that shape.
        only_reshapes = self.checkpoints.reshaped_from and self.steps_done == self.resumed_from
        if self.checkpoints.saved_at != self.steps_done or only_reshapes:
            self.save(more_steps=False)
        finish_deletions()
        return self._finish()

    def close(self) -> None:
        """Release the engine and the checkpoint manager. An unfinished save stays invisible."""
        self.checkpoints.close()
        self.engine.close()

    def _train_steps(self) -> None:
        self._prepare_first_step()
        if self._has_no_steps_left():
            return
        for _, micro_batches in self.loader.steps(start=self.steps_done):
            self.train_step(micro_batches)
            is_over = self._is_over()
            self._evaluate_if_due()
            if is_over:
                return
            self.checkpoints.save_if_due(self.steps_done, self.records.last_row())

    def _prepare_first_step(self) -> None:
        if self.evaluator and self.steps_done == 0:
            self.evaluator.note_before(self.checkpoints.record)
        self._evaluate_if_due()  # the previous start may have had to stop before it could evaluate
        self.checkpoints.record.setdefault("seconds_to_first_step", time.perf_counter() - self._began)

    def _has_no_steps_left(self) -> bool:
        """Return whether this start has no steps to train: the run, or its time slot, is already over."""
        return self.steps_done >= self.num_steps or self.stops.time_slot_has_ended(self.steps_done)

    def _is_over(self) -> bool:
        """Return whether training ends here: this was the last step, or a stop was requested. Collective."""
        return self.steps_done >= self.num_steps or self.stops.agree(self.steps_done)

    def _evaluate_if_due(self) -> None:
        if self.evaluator and not self.stops.may_be_killed_soon():
            self.evaluator.evaluate_if_due(self.checkpoints.record, self.steps_done)

    def _evaluate_for_best(self) -> float | None:
        if self.evaluator is None or self.stops.may_be_killed_soon():
            return None
        return self.evaluator.loss_at(self.checkpoints.record, self.steps_done)

    def train_step(self, micro_batches: list[dict[str, Tensor]]) -> None:
        """Train one optimizer step and record it. Collective.

        Args:
            micro_batches: this rank's share of the global batch.

        Raises:
            NonFiniteLoss: the loss or the gradient is NaN or infinite.
        """
        began, step = time.perf_counter(), self.steps_done + 1
        probe = StepProbe(self.topology) if step == self.measured_step else None
        with probe.measuring() if probe else nullcontext():
            tokens = count_tokens(micro_batches, self.topology, step=step)
            self.engine.train(True)
            loss_sum = torch.zeros((), dtype=torch.float64, device=self.engine.device)
            for batch in micro_batches:
                with probe.forward(self.engine) if probe else nullcontext():
                    batch_sum = token_loss_sum(self.engine.forward(batch), batch["labels"])
                self.engine.backward(batch_sum / tokens)
                loss_sum += batch_sum.detach()
                if probe:
                    probe.note_states(self.engine)
            loss = sum_over_ranks(loss_sum, self.topology, step=step) / tokens
            if not math.isfinite(loss):
                raise NonFiniteLoss(self._diverged(f"the loss is {loss}", step))
            rate = self.engine.schedule.rate
            norm = self.engine.step()
        if not math.isfinite(norm) and not self.engine.update_was_skipped:
            raise NonFiniteLoss(self._diverged(f"the gradient's norm is {norm}", step))
        self.steps_done = step
        if probe:
            self.measured = probe.measurements(self.engine, step)
        self._record(loss, tokens, None if self.engine.update_was_skipped else norm, rate, time.perf_counter() - began)

    def _record(self, loss: float, tokens: int, norm: float | None, rate: float, seconds: float) -> None:
        epoch = (self.steps_done - 1) // self.loader.steps_per_epoch
        self.records.add(StepRow(self.steps_done, epoch, loss, tokens, norm, rate, seconds))

    def save(self, *, more_steps: bool) -> None:
        """Evaluate for ``keep_best``, then write a checkpoint of the state after the last step. Collective.

        Args:
            more_steps: whether more steps follow; with ``async_save`` they do not wait until the files are written.
        """
        self.checkpoints.save(self.steps_done, self.records.last_row(), more_steps=more_steps)

    def _diverged(self, what: str, step: int) -> str:
        if step == 1 and what.startswith("the loss"):
            return (
                f"Before the first update, {what}, so it comes from the weights of {self.config.model.name!r}. "
                "Look for NaN or infinite numbers in its files, or write precision='fp32' if they need that range."
            )
        self.checkpoints.finish()  # all ranks get here, and this save may be the newest one
        newest = self.checkpoints.newest()
        saved = f"The newest checkpoint is {newest}." if newest else "No checkpoint had been saved."
        return (
            f"At step {step} {what}. {saved} "
            f"Lower learning_rate (now {self.config.optimizer.learning_rate}), raise warmup_steps, or set "
            "gradient_clipping."
        )

    def _finish(self) -> Result:
        eval_loss = None
        if self.evaluator and self.stops.stopped_by is None:
            record = self.checkpoints.record
            noted = record.get("eval_loss")
            eval_loss = self.evaluator.loss_at(record, self.steps_done) if noted is None else noted
        result = collect_result(self, eval_loss, self._facts())
        if self.topology.rank == 0:
            write_atomically(self.run.result_file, result.to_json())
        barrier()
        return result

    def _facts(self) -> dict[str, Any]:
        """Return extra entries of the result that only some kinds of training have."""
        return {}


class _NoData:
    """Stand-in for the training data of a start that trains no steps. It only keeps the saved position.

    Args:
        run: the run's settings. If they give epochs instead of steps, ``start`` knows the number of steps.
        start: where this start begins.
    """

    def __init__(self, run: RunConfig, start: Start) -> None:
        self.num_steps = self.last_step = run.steps or start.saved_num_steps()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_at(self, step: int) -> dict[str, Any]:
        return self._state
