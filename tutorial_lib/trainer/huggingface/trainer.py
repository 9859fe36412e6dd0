"""transformers' ``Trainer`` with this package's order of examples, AdamW and checkpoint directory.

These are the main overrides. The first two make the losses equal those of the package's own loop:

- ``get_train_dataloader``: it returns the micro-batches of this data-parallel rank, in the order that data, seed and
  global batch determine. accelerate must not split them among the ranks a second time;
- ``create_optimizer``: AdamW decays every trained parameter. By default, the ``Trainer`` excludes biases and norms,
  while DeepSpeed's JSON files have no such exception;
- ``get_batch_samples``: here the ``Trainer`` counts the step's tokens over all micro-batches and ranks, because it
  divides the loss sum by their number. The run checks that number;
- ``_save_checkpoint``: the checkpoint goes into a directory that is hashed, and gets its final name once it is
  complete. Its weights keep the names and shapes that they have in memory. By default, transformers saves the experts
  of a mixture one by one. The ``Trainer`` would not find them again when it resumes, and would only log that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tutorial_lib.checkpoint.manifest import CheckpointError

if TYPE_CHECKING:
    from tutorial_lib.trainer.huggingface.run import HuggingFaceRun


class HuggingFaceTrainer(Trainer):
    """The ``Trainer`` of one run.

    Args:
        run: the run, which provides data and settings, and is notified of every step.
        model: the model to train.
        args: from :func:`tutorial_lib.trainer.huggingface.arguments.build_arguments`.
    """

    def __init__(self, run: HuggingFaceRun, model: Any, args: TrainingArguments) -> None:
        self.run = run
        self.around_forward: Callable[[], AbstractContextManager[None]] = nullcontext
        self.after_backward: Callable[[], None] | None = None
        super().__init__(model=model, args=args, callbacks=[_Callback(run)])
        self.remove_callback(PrinterCallback)  # the run writes its rows to metrics.jsonl

    def get_train_dataloader(self) -> Any:
        return self.run.loader

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            own: Any = self.model if model is None else model
            trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, **self.run.config.optimizer.adamw)
        return self.optimizer

    def compute_loss(self, *args: Any, **given: Any) -> Any:
        with self.around_forward():
            return super().compute_loss(*args, **given)

    def training_step(self, *args: Any, **given: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **given)
        if self.after_backward:
            self.after_backward()
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        self.run.begin_step()
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.run.note_batches(batches, num_tokens)
        return batches, num_tokens

    def _run_epoch(self, *args: Any, **given: Any) -> None:
        if self.control.should_training_stop:
            return  # this start has no steps left to train
        super()._run_epoch(*args, **given)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.run.save(more_steps=True)

    def write_checkpoint(self, directory: Path) -> None:
        """Write the ``Trainer``'s ``checkpoint-N`` into a directory. Collective."""
        model: Any = self.model
        original = self.args.output_dir
        self.args.output_dir = str(directory)
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save_checkpoint(self.model_wrapped, trial=None)
        finally:
            self.args.output_dir = original
            del model.save_pretrained  # restores the class's own method

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint with weights that the model does not have, because those of its own would be lost."""
        if unknown := load_result.unexpected_keys:
            raise CheckpointError(
                f"The checkpoint holds {len(unknown)} tensors that the model has no place for, such as {unknown[0]}. "
                "Resumed without them, it would be a different model. If an older version saved this checkpoint, start "
                "a new run."
            )
        super()._issue_warnings_after_load(load_result)


class _Callback(TrainerCallback):
    """Notifies the run of the ``Trainer``'s progress, and tells the ``Trainer`` when to stop and to save."""

    def __init__(self, run: HuggingFaceRun) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.run.begin_training()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:  # other logs summarise the full training
            is_over = self.run.end_step(state.global_step, logs)
            control.should_training_stop = is_over
            control.should_save = not is_over and self.run.checkpoints.is_due(state.global_step)
