"""Run of the Hugging Face Trainer: its rows, evaluations, stops, checkpoints and result.

The ``Trainer`` owns the loop, and calls this module for the work that the package's own loop does between two steps.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tutorial_lib.checkpoint.formats import trainer as trainer_format
from tutorial_lib.checkpoint.rank_writer import Writer
from tutorial_lib.config import ConfigError
from tutorial_lib.dataloader import build_epoch_loader
from tutorial_lib.engine import try_engine
from tutorial_lib.engine.deepspeed.file import find, read_json
from tutorial_lib.engine.deepspeed.trainer_file import auto_keys
from tutorial_lib.engine.fsdp.sharding import local_part, unreduced_gradients
from tutorial_lib.engine.single import global_norm, model_inputs
from tutorial_lib.models import build_model
from tutorial_lib.mpu.device import local_device
from tutorial_lib.mpu.random_states import seed_everything
from tutorial_lib.trainer.answers import read_questions
from tutorial_lib.trainer.huggingface.arguments import build_arguments, reset_global_state
from tutorial_lib.trainer.huggingface.trainer import HuggingFaceTrainer
from tutorial_lib.trainer.loop import Trainer
from tutorial_lib.trainer.loss import NonFiniteLoss, count_tokens
from tutorial_lib.trainer.step_probe import StepProbe


class HuggingFaceRun(Trainer):
    """One start of a run on one rank, trained by the Hugging Face Trainer."""

    def build_loader(self) -> Any:
        return build_epoch_loader(self.config, self.tokenizer, self.topology)

    def build_engine(self) -> Any:
        self._probe: StepProbe | None = None
        self._probing = ExitStack()
        if self.config.engine.shard_at_load:
            check_accelerator(local_device(self.config.run))
        try_engine(self.config, self.topology, self.num_steps)
        seed_everything(self.config.run.seed)
        engine = _TrainedModel(self)
        seed_everything(self.config.run.seed + 1 + self.topology.dp_rank)
        return engine

    def build_score(self) -> Callable[[], dict[str, float]] | None:
        """Return a function that answers the evaluation questions, if ``score_answers`` asks for it."""
        if not self.config.run.score_answers:
            return None
        self._questions = read_questions(self.config, self.tokenizer)

        def stops() -> bool:
            return self.stops.agree(self.steps_done) and self.stops.may_be_killed_soon()

        def score() -> dict[str, float]:
            grid, micro_batch = self.topology, self.config.micro_batch
            report = self._questions.answer(
                self.engine.module, micro_batch, dp_rank=grid.dp_rank, dp_size=grid.dp, stops=stops
            )
            return {"exact_match": report.score.exact_match, "f1": report.score.f1} if report else {}

        return score

    def close(self) -> None:
        self._probing.close()
        super().close()

    def _train_steps(self) -> None:
        if self._has_no_steps_left() and self.evaluator is None:
            return
        self.engine.trainer.train(resume_from_checkpoint=self.engine.resumes_from)

    def begin_training(self) -> bool:
        """Evaluate before the first step, and return whether this start has no steps to train. Collective."""
        self._prepare_first_step()
        self.engine.report_norm_without_zero()
        if self.resumed_from is None:  # otherwise the Trainer restores the saved states
            seed_everything(self.config.run.seed + 1 + self.topology.dp_rank)
        return self._has_no_steps_left()

    def begin_step(self) -> None:
        """Start timing a step just before its batches are read, and start the probe if this step is measured."""
        self._step_began = time.perf_counter()
        if self.steps_done + 1 == self.measured_step:
            self._probe = StepProbe(self.topology)
            self._probing.enter_context(self._probe.measuring())
            self._probing.enter_context(self.engine.calling_after_backward(self.note_states))
            self.engine.trainer.around_forward = partial(self._probe.forward, self.engine)

    def note_states(self) -> None:
        """Tell the probe, if there is one, to note the current model states, because gradients are at their peak."""
        if self._probe:
            self._probe.note_states(self.engine)

    def note_batches(self, batches: list[Any], num_tokens: Tensor | int | None) -> None:
        """Count the tokens of the step that is about to start, over all ranks. Collective.

        Args:
            batches: this rank's micro-batches of the step.
            num_tokens: number by which the Trainer divides the loss sum.

        Raises:
            ConfigError: no token enters the loss, or the Trainer would divide by a different number.
        """
        self._tokens = count_tokens(batches, self.topology, step=self.steps_done + 1)
        if num_tokens is None or int(num_tokens) != self._tokens:
            raise ConfigError(
                f"engine='trainer' with {self.config.model.name!r}: the Hugging Face Trainer divides the loss of step "
                f"{self.steps_done + 1} by {num_tokens} tokens, but the step has {self._tokens}. This family's loss "
                "does not give every token the same weight. Choose another engine, such as engine='deepspeed'."
            )

    def end_step(self, step: int, logs: dict[str, float]) -> bool:
        """Record a trained step, and return whether it was the last one of this start. Collective.

        Args:
            step: number of optimizer steps done.
            logs: the Trainer's log of the step: ``loss``, ``learning_rate`` and, if known, ``grad_norm``.

        Raises:
            NonFiniteLoss: the loss or the gradient is NaN or infinite.
        """
        norm = logs.get("grad_norm")
        if not math.isfinite(logs["loss"]):
            raise NonFiniteLoss(self._diverged(f"the loss is {logs['loss']}", step))
        if norm is not None and not math.isfinite(norm) and self.config.engine.precision != "fp16":
            raise NonFiniteLoss(self._diverged(f"the gradient's norm is {norm}", step))
        self.steps_done = step
        if self._probe:
            self._probing.close()
            self.engine.trainer.around_forward = nullcontext
            self.measured, self._probe = self._probe.measurements(self.engine, step), None
        norm = norm if norm is not None and math.isfinite(norm) else None
        self._record(logs["loss"], self._tokens, norm, logs["learning_rate"], time.perf_counter() - self._step_began)
        is_over = self._is_over()
        self._evaluate_if_due()
        return is_over

    def _facts(self) -> dict[str, Any]:
        facts = {"deepspeed_config": self.engine.deepspeed_config(), "deepspeed_auto": self.engine.auto_values()}
        if self.config.run.score_answers and self.evaluator and self.stops.stopped_by is None:
            scores = self.evaluator.scores_at(self.steps_done)
            counts = {"num_questions": len(self._questions.prompts), "num_cut": self._questions.num_cut}
            if "f1" in scores:  # otherwise the run was asked to stop while it answered
                facts["eval_answers"] = {"exact_match": scores["exact_match"], "f1": scores["f1"], **counts}
        return facts


class _TrainedModel:
    """The Trainer's model, with the interface that evaluation and checkpoints need.

    Args:
        run: the run that trains it.
    """

    def __init__(self, run: HuggingFaceRun) -> None:
        config = run.config
        self.device = local_device(config.run)
        self.resumes_from: str | None = None
        self._rank, self._zero_stage = run.topology.rank, config.engine.zero_stage
        self._precision = config.engine.precision
        self._file = config.engine.deepspeed_file
        self._environment = dict(os.environ)
        reset_global_state()
        # Build these before the model: if they ask for stage 3, transformers partitions the model while building it.
        args = build_arguments(config, run.num_steps)
        if self._file:
            # Otherwise DeepSpeed would use a GPU whenever there is one, even for a run on the CPU.
            os.environ["DS_ACCELERATOR"] = self.device.type
            from tutorial_lib.engine.deepspeed.engine import join_process_group

            join_process_group()
        model = build_model(config)
        self.num_parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())
        self.trainer = HuggingFaceTrainer(run, model, args)

    @property
    def module(self) -> Any:
        return self.trainer.model

    @property
    def schedule(self) -> _TrainersSchedule:
        return _TrainersSchedule(self.trainer.lr_scheduler)

    def state_tensors(self) -> dict[str, list[Tensor]]:
        """Return the tensors of this rank's model states by part: ``parameters``, ``gradients``, ``optimizer``."""
        engine = self.trainer.deepspeed
        if engine is not None:
            from tutorial_lib.engine.deepspeed.engine import held_tensors

            return held_tensors(engine, engine.basic_optimizer)
        parameters = list(self.module.parameters())
        optimizer = self.trainer.optimizer  # None before the first step
        states = [t for state in optimizer.state.values() for t in state.values()] if optimizer else []
        return {
            "parameters": [_held(p) for p in parameters],
            "gradients": [p.grad for p in parameters if p.grad is not None] + unreduced_gradients(self.module),
            "optimizer": [t for t in states if torch.is_tensor(t) and t.dim() > 0],
        }

    @contextmanager
    def calling_after_backward(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call ``callback`` after each backward pass, before accelerate lets DeepSpeed update the weights."""
        engine = self.trainer.deepspeed
        if engine is None:
            self.trainer.after_backward = callback
        else:
            own = engine.backward

            def backward(*args: Any, **given: Any) -> Any:
                result = own(*args, **given)
                callback()
                return result

            engine.backward = backward
        try:
            yield
        finally:
            self.trainer.after_backward = None
            if engine is not None:
                del engine.backward  # restores the class's own method

    def report_norm_without_zero(self) -> None:
        """Make DeepSpeed report the gradient's norm at stage 0 in fp32, where it computes one only to clip."""
        engine = self.trainer.deepspeed
        if engine is None or self._zero_stage > 0 or self._precision != "fp32":
            return
        norm, own = 0.0, engine.step

        def step(*args: Any, **given: Any) -> Any:
            nonlocal norm
            norm = global_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
            return own(*args, **given)

        engine.step, engine.get_global_grad_norm = step, lambda: norm

    def train(self, mode: bool) -> None:
        self.trainer.model_wrapped.train(mode)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of a batch, shape (B, S, V)."""
        logits: Tensor = self.trainer.model_wrapped(**model_inputs(batch, self.device), use_cache=False).logits
        return logits

    def save(self, directory: Path, writer: Writer) -> None:
        """Make the Trainer write its checkpoint into ``directory``. Collective."""
        directory.mkdir(exist_ok=True)
        self.trainer.write_checkpoint(directory)

        def is_own(name: str) -> bool:
            found = trainer_format.rank_and_contents(name, self._zero_stage)
            return found is not None and found[0] == self._rank

        writer.add_files(directory, is_own)

    def load(self, directory: Path) -> None:
        """Remember the checkpoint, which the Trainer loads when it starts to train."""
        self.resumes_from = str(trainer_format.written_by_trainer(directory))

    def deepspeed_config(self) -> dict[str, Any] | None:
        """Return the final DeepSpeed configuration, or None without DeepSpeed."""
        if not self._file:
            return None
        resolved = self.trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        return dict(json.loads(json.dumps(resolved), parse_constant=str))  # JSON cannot express infinity

    def auto_values(self) -> dict[str, Any] | None:
        """Return the final value of every ``"auto"`` in the DeepSpeed file, by dotted key."""
        resolved = self.deepspeed_config()
        if resolved is None or self._file is None:
            return None
        return {key: find(resolved, key) for key in auto_keys(read_json(self._file))}

    def close(self) -> None:
        """Release global state, so that another run can be trained in the same process."""
        if self.trainer.deepspeed is not None:
            from tutorial_lib.engine.deepspeed.engine import forget_module

            self.trainer.deepspeed.destroy()
            forget_module(self.trainer.deepspeed.module)
        self.trainer.accelerator.free_memory()
        reset_global_state()
        os.environ.clear()
        os.environ.update(self._environment)


def _held(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that this rank holds.

    On a CPU, a shard that transformers loaded is a window into the memory-mapped weight file. The rest of the file is
    never read into memory, but would be counted with it, so this returns a copy of the window.
    """
    return local_part(parameter).clone() if isinstance(parameter, DTensor) else parameter


def check_accelerator(device: torch.device) -> None:
    """Refuse a run whose device is not the accelerator that ``DistributedConfig`` puts the model on.

    Raises:
        ConfigError: the run is meant for the CPU, but there is a GPU.
    """
    found = torch.accelerator.current_accelerator(check_available=True)  # a CUDA build does not imply a GPU
    if found is not None and found.type != device.type:
        raise ConfigError(
            f"shard_at_load=True puts the model on the {found.type} device of this machine, but this run should train "
            f"on {device.type}. Write device={found.type!r}, or hide the device (CUDA_VISIBLE_DEVICES='')."
        )


class _TrainersSchedule:
    """The Trainer's learning-rate schedule: checkpoints record it, but the Trainer restores it from its own files.

    Args:
        scheduler: the Trainer's scheduler, or None before it trains.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return dict(self._scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the Trainer restores its schedule itself."""
