"""``TrainingArguments`` of a run, and the global state that they leave in a process.

transformers and accelerate keep their setup in global variables and in the environment. Several runs may share a
process here, so each run starts by clearing the state of the previous one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tutorial_lib.config import Config
from tutorial_lib.engine.deepspeed.trainer_file import for_trainer


def build_arguments(config: Config, num_steps: int) -> TrainingArguments:
    """Translate a run's settings for transformers.

    The ``Trainer`` logs every step, because each becomes a row. The run itself decides when to save and evaluate.

    Args:
        config: what to run.
        num_steps: total number of optimizer steps of the run.
    """
    o, on_cpu = config.optimizer, config.run.device == "cpu"
    file = config.engine.deepspeed_file
    given: dict[str, Any] = {
        "output_dir": str(config.directory / "checkpoints"),
        "per_device_train_batch_size": config.micro_batch,
        "per_device_eval_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "max_steps": num_steps,
        "learning_rate": o.learning_rate,
        "adam_beta1": o.beta1,
        "adam_beta2": o.beta2,
        "adam_epsilon": o.eps,
        "weight_decay": o.weight_decay,
        "max_grad_norm": o.gradient_clipping,
        "lr_scheduler_type": o.scheduler_name,
        "warmup_steps": o.warmup_steps,
        "seed": config.run.seed,
        "bf16": config.engine.precision == "bf16",
        "fp16": config.engine.precision == "fp16",
        "deepspeed": for_trainer(file) if file else None,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and config.parallel.world_size > 1 else None,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would replace a NaN or infinite loss with an average
        "save_strategy": "no",
        "save_only_model": config.engine.shard_at_load,  # transformers cannot save the optimizer state of such a model
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "warning",
    }
    with _hidden_rank(config.parallel.world_size == 1 and not file):
        arguments = TrainingArguments(**given)
    arguments._n_gpu = 1  # otherwise a run with a single rank would use DataParallel on every GPU that it sees
    return arguments


@contextmanager
def _hidden_rank(is_alone: bool) -> Iterator[None]:
    """Hide ``LOCAL_RANK`` in a run with a single rank; otherwise accelerate would wrap the model."""
    hidden = {name: os.environ.pop(name) for name in ("LOCAL_RANK",) if is_alone and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def reset_global_state() -> None:
    """Clear the global state of transformers and accelerate in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
