"""One training loop over any engine.

Shape legend: B sequences of a micro-batch, S tokens, V vocabulary.

The loss of an optimizer step is the mean over the step's tokens, wherever they are: over every rank and every
micro-batch. Ranks hold different numbers of tokens, so a mean of per-rank means would weigh them differently, in the
report and, worse, in the gradient. The loop therefore counts the step's tokens first (one small all-gather), divides
every micro-batch's loss *sum* by that count, and adds up.

What the ranks of a tensor-parallel group must have in common is compared on the way
(:mod:`tutorial_lib.trainer.consistency`).
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import get_scheduler

from tutorial_lib import checkpoint
from tutorial_lib.checkpoint import CheckpointManager, OnCheckpoint, Progress
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.config.checks import check_warmup
from tutorial_lib.dataloader import build_eval_loader, build_train_loader, data_identity
from tutorial_lib.dataloader.collate import fingerprint
from tutorial_lib.engine import build_engine
from tutorial_lib.engine.deepspeed.config import apply_file
from tutorial_lib.measure.memory import peak_memory, reset_peak_memory
from tutorial_lib.models import load_tokenizer
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.collectives import all_gather_ints, all_gather_objects, barrier
from tutorial_lib.mpu.random_states import seed_everything
from tutorial_lib.records import Row, RunDirectory, write_atomically
from tutorial_lib.trainer.consistency import check_batches, check_losses
from tutorial_lib.trainer.loss import NonFiniteLoss, count_tokens, token_loss_sum
from tutorial_lib.trainer.probe import StepProbe, measured_step
from tutorial_lib.trainer.process import local_device, output_to, stop_signals

SLOT_IS_OVER, REQUEST = "stop_after", "request"
"""Values of ``stopped_by`` in ``result.json``; a signal is given by its name, such as ``SIGTERM``."""

_REQUESTED = 1000
"""Stands beside signal numbers for a request through the stop file; larger than any of them."""


def train_all(configs: Sequence[Config], *, on_checkpoint: OnCheckpoint | None = None) -> list[dict[str, Any]]:
    """Run or continue several runs one after the other, until one of them is asked to stop. Collective.

    Args:
        configs: what to train.
        on_checkpoint: for the last of them, see :func:`train`.

    Returns:
        The results of those that were begun.
    """
    results: list[dict[str, Any]] = []
    for config in configs:
        results.append(train(config, on_checkpoint=on_checkpoint if config is configs[-1] else None))
        if results[-1]["stopped_by"] not in (None, SLOT_IS_OVER):
            break
    return results


def train(config: Config, *, on_checkpoint: OnCheckpoint | None = None) -> dict[str, Any]:
    """Run or continue one training run in this process, as one rank of the process group that exists.

    Every launcher calls this on every rank. Without a process group it is a run of one rank.

    Returns:
        What ``result.json`` holds, on every rank.

    Raises:
        ConfigError: the configuration cannot run here, or another start of this run has not ended.
        CheckpointError: there are checkpoints, but none that can be continued.
        NonFiniteLoss: training diverged.
        RanksDisagree: ranks of a tensor-parallel group read different batches, or computed different losses.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    config = apply_file(config)
    local_world_size = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None
    topology = Topology.create(config.parallel, rank=rank, world_size=world_size, local_world_size=local_world_size)
    run = RunDirectory(config.directory)
    started = time.perf_counter()
    if rank == 0:
        run.create()
    with checkpoint.held_for_training(run, topology):
        # Only torchrun's ranks clear old requests here. Elsewhere the launcher did, and a new request may be there.
        if rank == 0 and config.run.launcher == "none" and "RANK" in os.environ:
            run.clear_requests()
        barrier()
        if not run.logs.is_dir():
            raise ConfigError(
                f"{run.path} cannot be seen from rank {rank}. Storage must be a directory that every node sees, such "
                "as one on a network file system: choose another one."
            )
        log = run.log_file(rank) if config.run.launcher != "none" else None
        with output_to(log), stop_signals() as stop_signalled:
            try:
                trainer = _trainer_of(config)(
                    config, topology, on_checkpoint=on_checkpoint, stop_signalled=stop_signalled
                )
                try:
                    return trainer.fit(started)
                finally:
                    trainer.close()
                    gc.collect()
            except BaseException as error:
                refused = checkpoint.storage_failure(run, error)
                with suppress(OSError):
                    if refused:
                        checkpoint.clear_remains(run)  # a half checkpoint takes the room that the error needs
                    # Where nothing can be written, the launcher has what Python prints at the end.
                    run.write_error(rank, refused or error)
                if refused:
                    raise refused from error
                raise


def _trainer_of(config: Config) -> type[Trainer]:
    """Return who runs the training loop: this module, or the Hugging Face Trainer."""
    if config.engine.name != "trainer":
        return Trainer
    from tutorial_lib.trainer.huggingface import HuggingFaceRun  # loads transformers' Trainer and accelerate

    return HuggingFaceRun


class _NoData:
    """The place of the training loader in a start that trains no step: it keeps the position that it is given."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state


class Trainer:
    """One start of a run on one rank: from the newest checkpoint, or step 0, to the end or a stop.

    Args:
        config: what to run.
        topology: this rank's place in the grid.
        on_checkpoint: see :func:`train`.
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
        self.stop_signalled = stop_signalled
        self.device = local_device(config)
        reset_peak_memory(self.device)
        self.tokenizer = load_tokenizer(config.model.name, trust_remote_code=config.model.trust_remote_code)
        data = functools.cache(lambda: data_identity(config, self.tokenizer))
        self.checkpoints = CheckpointManager(config, topology, data=data, on_checkpoint=on_checkpoint)
        seed_everything(config.run.seed)
        place = {"dp_rank": topology.dp_rank, "dp_size": topology.dp}
        self.loader: Any = self._build_loader(**place) if self.checkpoints.reads_data else _NoData()
        self.eval_loader = build_eval_loader(config, self.tokenizer, **place) if config.run.evaluate else None
        self.num_steps = config.run.steps or self._count_steps()
        if self.checkpoints.found is None:
            check_warmup(config.optimizer.warmup_steps, self.num_steps)
        self.engine: Any
        self.scheduler: Any
        self._build_engine()
        # Ranks that read different data draw different dropout masks; the ranks of a tensor-parallel group the same.
        seed_everything(config.run.seed + 1 + topology.dp_rank)
        self.step = 0
        self.record: dict[str, Any] = {}
        self.row: Row = {}
        self.stopped_by: str | None = None
        self.measured: dict[str, Any] | None = None
        self.eval_speed: float | None = None
        self.resumed_from: int | None = None
        self.reshaped_from: dict[str, Any] | None = None
        self._restore()
        self.restarts = self._restarts_until_here() if topology.rank == 0 else []

    def _build_loader(self, *, dp_rank: int, dp_size: int) -> Any:
        return build_train_loader(self.config, self.tokenizer, dp_rank=dp_rank, dp_size=dp_size)

    def _build_engine(self) -> None:
        self.engine = build_engine(self.config, self.topology, self.device)
        o = self.config.optimizer
        self.scheduler = get_scheduler(o.scheduler_name, self.engine.optimizer, o.warmup_steps, self.num_steps)

    def _count_steps(self) -> int:
        if not self.checkpoints.reads_data:
            return self.checkpoints.saved_num_steps()
        return int(self.config.run.epochs * self.loader.steps_per_epoch)

    def _restore(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        progress = self.checkpoints.restore(self.engine, self.loader)
        if progress is None:
            return
        self.step = self.resumed_from = progress.step
        self.reshaped_from = progress.reshaped_from
        self.record = progress.record
        self._restore_schedule(progress.scheduler)
        if self.reshaped_from:
            # The random states that were saved belong to ranks that no longer exist.
            place = (self.config.run.seed, self.step, self.topology.dp_rank)
            seed_everything(int(np.random.SeedSequence(place).generate_state(1)[0]))
        if self.topology.rank == 0:
            self.run.keep_rows_until(progress.step)

    def _restore_schedule(self, state: dict[str, Any]) -> None:
        # All groups of parameters have one rate; how many groups there are depends on the engine's meshes.
        groups = self.engine.optimizer.param_groups
        per_group = ("base_lrs", "_last_lr", "lr_lambdas")
        self.scheduler.load_state_dict(state | {name: state[name][:1] * len(groups) for name in per_group})
        for group in groups:
            group["lr"] = self.scheduler.get_last_lr()[0]

    def _restarts_until_here(self) -> list[dict[str, Any]]:
        """Return the failures of this launch that led to this start, with the step that each was answered from."""
        restarts = self.run.restarts()
        for restart in restarts:
            restart.setdefault("from_step", self.step)
        if restarts:
            self.run.write_restarts(restarts)
        return restarts

    def fit(self, started: float | None = None) -> dict[str, Any]:
        """Evaluate, train to the end or until asked to stop, save, and evaluate. Collective.

        Args:
            started: ``time.perf_counter()`` when this start began, for ``seconds_to_first_step``; default: now.

        Returns:
            What ``result.json`` holds, on every rank.
        """
        self._began = time.perf_counter() if started is None else started
        if self.topology.rank == 0:
            write_atomically(self.run.config_file, self.config.to_json())
            self.run.result_file.unlink(missing_ok=True)
            if self.resumed_from is None:
                self.run.metrics_file.unlink(missing_ok=True)
        self._train_steps()
        # A run that resumed in a different shape, and stops where it was, still leaves a checkpoint of that shape.
        reshaped_alone = self.reshaped_from and self.step == self.resumed_from
        if self.checkpoints.saved_at != self.step or reshaped_alone:
            self.save(and_train_on=False)
        checkpoint.finish_deletions()
        return self._finish("completed" if self.stopped_by is None else "stopped")

    def close(self) -> None:
        """Release what outlives this object. A save that is not finished stays invisible."""
        self.checkpoints.close()
        self.engine.close()

    def _train_steps(self) -> None:
        """Train until the last step, or until something asks to stop, which is then in :attr:`stopped_by`."""
        self._prepare_first_step()
        if self._is_over():
            return
        for micro_batches in self.loader.steps():
            stop = self.train_step(micro_batches)
            is_over = self._is_over(stop)
            self._evaluate_if_due()
            if is_over:
                return
            if self.checkpoints.is_due(self.step):
                self.save(and_train_on=True)

    def _prepare_first_step(self) -> None:
        if self.eval_loader is not None and self.step == 0:
            self.record["eval_loss_before"] = self.evaluate()
        self._evaluate_if_due()  # also where a start that was stopped in a hurry has left it out
        self.record.setdefault("seconds_to_first_step", time.perf_counter() - self._began)

    def _evaluate_if_due(self) -> None:
        """Add this step to ``eval_losses``, if ``evaluate_every`` asks for it and nobody is in a hurry. Collective."""
        every = self.config.run.evaluate_every
        if every is None or self.eval_loader is None or self._is_in_a_hurry():
            return
        per_epoch = self.loader.steps_per_epoch
        losses: list[dict[str, Any]] = self.record.setdefault("eval_losses", [])
        if self.step % (per_epoch if every == "epoch" else int(every)) == 0 and self._eval_loss_here() is None:
            loss = self.record["eval_loss_before"] if self.step == 0 else self.evaluate()
            losses.append({"epoch": self.step / per_epoch, "step": self.step, "loss": loss})

    def _eval_loss_here(self) -> float | None:
        """Return the evaluation loss after the last step, if ``evaluate_every`` has asked for it."""
        last = next(iter(self.record.get("eval_losses", [])[-1:]), None)
        return last["loss"] if last and last["step"] == self.step else None

    def _is_in_a_hurry(self) -> bool:
        """Return whether somebody has asked the run to stop, and may end it soon."""
        return self.stopped_by not in (None, SLOT_IS_OVER)

    def _is_over(self, stop: str | None = None) -> bool:
        """Return whether no step follows: the last one was trained, or the slot is over, or something asks to stop."""
        if self.step >= self.num_steps:
            return True
        limit = self.config.run.stop_after
        slot_is_over = limit is not None and self.step >= limit
        self.stopped_by = stop or (SLOT_IS_OVER if slot_is_over else None)
        return self.stopped_by is not None

    def train_step(self, micro_batches: list[dict[str, Tensor]]) -> str | None:
        """Train one optimizer step and record it in :attr:`row`. Collective.

        Args:
            micro_batches: this rank's share of the global batch.

        Returns:
            What asked a rank to stop, or None.

        Raises:
            NonFiniteLoss: the loss or the gradient is no longer a number.
        """
        began = time.perf_counter()
        is_measured = self.config.run.measure and self.step + 1 == measured_step(self.num_steps)
        probe = StepProbe(self.topology) if is_measured else None
        with probe.measuring() if probe else nullcontext():
            tokens, stop, save_is_written = self._agree(micro_batches)
            self.engine.train(True)
            loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
            for batch in micro_batches:
                batch_loss = self._loss_sum(batch)
                loss_sum += batch_loss.detach()
                self.engine.backward(batch_loss * (self.engine.averages_over / tokens))
                if probe:
                    probe.note_states(self.engine)
            loss = self._sum_over_ranks(loss_sum) / tokens
            if not math.isfinite(loss):
                raise NonFiniteLoss(self._diverged(f"the loss is {loss}", self.step + 1))
            rate = self.scheduler.get_last_lr()[0]
            norm = self.engine.step()
        if self.engine.update_was_skipped:
            norm = math.inf
        elif math.isfinite(norm):
            self.scheduler.step()
        else:
            raise NonFiniteLoss(self._diverged(f"the gradient's norm is {norm}", self.step + 1))
        self.step += 1
        if probe:
            self.measured = probe.report(self.engine)
        self._record_row(loss=loss, tokens=tokens, norm=norm, rate=rate, seconds=time.perf_counter() - began)
        if save_is_written:
            self.checkpoints.finish()
        return stop

    def _record_row(self, *, loss: float, tokens: int, norm: float, rate: float, seconds: float) -> None:
        """Append the row of the step that was just trained to the metrics, and keep it in :attr:`row`."""
        self.row = {
            "step": self.step,
            "epoch": (self.step - 1) // self.loader.steps_per_epoch,
            "loss": loss,
            "tokens": tokens,
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": rate,
            "seconds": seconds,
        }
        if self.topology.rank == 0:
            self.run.append(self.row)

    def _loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        on_device = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        labels = on_device.pop("labels")
        return token_loss_sum(self.engine.forward(on_device), labels)

    def evaluate(self) -> float:
        """Mean loss per token over the evaluation split, weighing every token alike, on all ranks the same."""
        assert self.eval_loader is not None
        began = time.perf_counter()
        self.engine.train(False)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch in self.eval_loader:
                if self.topology.tp > 1:
                    own = all_gather_ints([fingerprint([batch])], self.device)
                    check_batches(self.topology, self.step + 1, [number for (number,) in own])
                totals[0] += self._loss_sum(batch)
                totals[1] += count_tokens(batch["labels"])
        loss = self._sum_over_ranks(totals[0]) / self._sum_over_ranks(totals[1])
        self.eval_speed = self.eval_loader.num_examples / (time.perf_counter() - began)
        return loss

    def save(self, *, and_train_on: bool) -> None:
        """Write a checkpoint of the state after the last step, evaluated first for ``keep_best``. Collective.

        Args:
            and_train_on: more steps follow, and with ``async_save`` they need not wait until the files are written.
        """
        self.checkpoints.finish()
        self.record.pop("eval_loss", None)
        self.record["num_steps"] = self.num_steps
        if self.config.run.keep_best and not self._is_in_a_hurry():
            here = self._eval_loss_here()
            self.record["eval_loss"] = self.evaluate() if here is None else here
        state = self.step, self._position(), self.scheduler.state_dict(), self.record
        progress = Progress(*state, self.checkpoints.identity())
        row = self.row or next(iter(self.run.rows()[-1:]), {})
        self.checkpoints.save(progress, self.engine, row, and_train_on=and_train_on)

    def _position(self) -> dict[str, Any]:
        """Return this rank's position in the data, for a checkpoint."""
        position: dict[str, Any] = self.loader.state_dict()
        return position

    def _agree(self, micro_batches: list[dict[str, Tensor]]) -> tuple[int, str | None, bool]:
        """What all ranks must know of a step. Collective.

        Returns:
            The step's tokens over all data-parallel ranks; what asked a rank to stop, or None; whether a save is in
            flight and every rank has written its files.

        Raises:
            ConfigError: no token of the step counts.
            RanksDisagree: the ranks of a tensor-parallel group read different batches; all ranks raise.
            OSError: this rank's files of the save in flight could not be written; this rank alone raises.
        """
        tokens = sum(count_tokens(batch["labels"]) for batch in micro_batches)
        written = self.checkpoints.is_written()
        batches = fingerprint(micro_batches) if self.topology.tp > 1 else 0
        by_rank = all_gather_ints([tokens, self._stop_requested(), int(written), batches], self.device)
        tokens_of, stop_of, written_of, batches_of = zip(*by_rank, strict=True)
        check_batches(self.topology, self.step + 1, batches_of)
        stop = max(stop_of)
        stopped_by = None if not stop else REQUEST if stop == _REQUESTED else signal.Signals(stop).name
        total = sum(tokens_of[:: self.topology.tp])
        if total == 0:
            raise ConfigError(
                f"No token of step {self.step + 1} counts: every label is masked. Raise seq_length "
                f"({self.config.data.seq_length}), so that answers are not cut off."
            )
        return total, stopped_by, all(written_of)

    def _sum_over_ranks(self, value: Tensor) -> float:
        """The sum of a float64 scalar over the data-parallel ranks. Collective.

        Raises:
            RanksDisagree: it differs within a tensor-parallel group; all ranks raise.
        """
        # As an integer a number passes to the last bit.
        by_rank = (
            torch.tensor(all_gather_ints([int(value.view(torch.int64))], self.device)).view(torch.float64).flatten()
        )
        check_losses(self.topology, self.step + 1, by_rank.tolist())
        return float(by_rank[:: self.topology.tp].sum())

    def _stop_requested(self) -> int:
        """The number of the signal that asked this rank to stop, ``_REQUESTED`` for the stop file, 0 for neither."""
        if self.topology.rank == 0 and self.run.stop_file.exists():
            return _REQUESTED
        return self.stop_signalled()

    def _diverged(self, what: str, step: int) -> str:
        if step == 1 and what.startswith("the loss"):
            return (
                f"Before the first update {what}: the weights of {self.config.model.name!r} give it by themselves. "
                "Look for NaN or infinite numbers in its files, or write precision='fp32' if they need its range."
            )
        self.checkpoints.finish()  # all ranks are here, and it may be the last good one
        newest = self.checkpoints.newest()
        good = f"The last good checkpoint is {newest}." if newest else "No checkpoint was saved before."
        return (
            f"At step {step} {what}. {good} "
            f"Lower learning_rate (now {self.config.optimizer.learning_rate}), raise warmup_steps, or state "
            "gradient_clipping."
        )

    def _finish(self, status: str) -> dict[str, Any]:
        eval_loss = None
        if status == "completed" and self.eval_loader is not None:
            eval_loss = self.record.get("eval_loss", self._eval_loss_here())
            eval_loss = self.evaluate() if eval_loss is None else eval_loss
        rows = self.run.rows()
        own = {"rank": self.topology.rank, "peak_memory_bytes": peak_memory(self.device), "measured": self.measured}
        per_rank = all_gather_objects(own)
        # The first step of a start allocates and compiles; it says nothing of the speed.
        steady = [row for row in rows if row["step"] > (self.resumed_from or 0) + 1]
        seconds = sum(row["seconds"] for row in steady)
        loaders: dict[str, Any] = {"train": self.loader, "eval": self.eval_loader}
        result = {
            "status": status,
            "stopped_by": self.stopped_by if status == "stopped" else None,
            "step": self.step,
            "num_steps": self.num_steps,
            "steps_per_epoch": getattr(self.loader, "steps_per_epoch", None),
            "resumed_from": self.resumed_from,
            "reshaped_from": self.reshaped_from,
            "left_out": [asdict(each) for each in self.checkpoints.left_out],
            "restarts": self.restarts,
            "data": {use: asdict(loader.summary) for use, loader in loaders.items() if hasattr(loader, "summary")},
            "train_loss": rows[-1]["loss"] if rows else None,
            "eval_loss_before": self.record.get("eval_loss_before"),
            "eval_loss": eval_loss,
            "eval_losses": self.record.get("eval_losses", []),
            "eval_samples_per_second": self.eval_speed,
            "tokens_per_second": sum(row["tokens"] for row in steady) / seconds if seconds else None,
            "seconds_to_first_step": self.record["seconds_to_first_step"],
            "num_parameters": self.engine.num_parameters,
            "checkpoint": checkpoint.directory_of(self.run, self.step).name,
            "saves": self.checkpoints.saves,
            "ranks": per_rank,
            "versions": {
                name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers", "datasets")
            },
        }
        result |= self._facts()
        if self.topology.rank == 0:
            write_atomically(self.run.result_file, json.dumps(result, indent=2) + "\n")
        barrier()
        return result

    def _facts(self) -> dict[str, Any]:
        """Return what the result holds besides, for one way of training alone."""
        return {}
