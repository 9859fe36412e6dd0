"""DeepSpeed behind the engine protocol: ZeRO stages 0 to 3, AutoTP, offload, fp32 / bf16 / fp16.

Shape legend: B sequences of a micro-batch, S tokens, V vocabulary.

The training loop passes a loss that is already divided by the optimizer step's token count over *all* ranks and
micro-batches. DeepSpeed averages gradients over the data-parallel ranks, so :meth:`DeepSpeedEngine.backward` multiplies
the loss by their number first, and DeepSpeed's own division by the accumulation steps is turned off. The result is the
gradient of the token-weighted mean. A mean of per-rank means would have a different gradient.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# If DeepSpeed has to find out by itself that there is no GPU, it warns on every start. A run has already set this
# variable from its configuration.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import cpuinfo
import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import groups
from torch import Tensor

from tutorial_lib.checkpoint import CheckpointError, FullTensors
from tutorial_lib.checkpoint.formats.deepspeed import LAYOUT
from tutorial_lib.checkpoint.rank_writer import Writer
from tutorial_lib.config import Config, EngineConfig, OptimizerConfig
from tutorial_lib.engine.chunked_loss import output_loss
from tutorial_lib.engine.deepspeed import autotp
from tutorial_lib.engine.deepspeed import config as ds_config
from tutorial_lib.engine.deepspeed.full_states import FullStates
from tutorial_lib.engine.learning_rate import Schedule
from tutorial_lib.engine.parameter_layout import ParameterLayout
from tutorial_lib.engine.single import global_norm, model_inputs
from tutorial_lib.models import build_model, slice_alibi
from tutorial_lib.mpu import ModelParallelUnit, Topology, device_mesh

_TAG = "engine"


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimizer without compiling it.

    ``deepspeed.initialize`` imports it for any optimizer, and its decorators import torch's entire compiler. That takes
    each rank a second or more, for kernels that nothing here calls. With this torch switch they stay plain functions.
    """
    with mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"), suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


_import_muon_uncompiled()

# DeepSpeed's CPU Adam asks for the processor's name whenever it is built, and cpuinfo starts a process to find out.
# That adds more than a second to each run with offload. The answer never changes, so ask only once.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


class DeepSpeedEngine:
    """One rank's share of a model that DeepSpeed trains.

    Args:
        config: what to run; ``config.engine`` decides the stage, the offload and the precision.
        topology: this rank's place in the grid.
        device: where forward and backward happen.

    The process group must exist: at stage 3 the model is partitioned while it is built, over that group.
    """

    schedule: Schedule

    def __init__(self, config: Config, topology: Topology, device: torch.device) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed(dist_init_required=False)
        self.config = config
        self.device = device
        self.averages_over = topology.dp
        self.unit = ModelParallelUnit(topology, device_mesh(topology, device.type)) if topology.tp > 1 else None
        _share_groups(self.unit)
        settings = ds_config.build(config)
        with _partition_at_construction(settings):
            model = build_model(config)
        if self.unit:
            ds_config.add_plan(settings, model.config)
        self.num_parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = _adamw(trained, config.optimizer, config.engine)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings, mpu=self.unit, dist_init_required=False
        )
        if self.unit:
            self._finish_splitting(model)
        self._output_loss = output_loss(model, config.engine.loss_chunks, autotp.split_loss_sum(model))
        self._dims = {self.module.get_parameter(row.parameter): row.dim for row in self.layout()}
        self._full_states = FullStates(
            self.deepspeed, self.optimizer, config.engine.zero_stage, self.unit, self._dims, device
        )
        self._micro_steps = 0
        if config.engine.zero_stage == 0 and config.engine.precision != "fp32":
            self.undo_step_of_construction()

    def _finish_splitting(self, model: Any) -> None:
        autotp.check_layouts(self.layout())
        assert self.unit is not None
        slice_alibi(model, self.unit.topology.tp, self.unit.topology.tp_rank)
        # This hook compares the batches within a group, but only in the first forward pass. The trainer compares them
        # in every step.
        self.deepspeed.first_dataloader_check.remove()

    @property
    def module(self) -> torch.nn.Module:
        """The model. At stage 3 its parameters are partitioned: use :meth:`full_parameters` to see them in full."""
        return self.deepspeed.module

    def train(self, mode: bool) -> None:
        self.deepspeed.train(mode)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of a batch, shape (B, S, V), or with ``loss_chunks`` the sum of its losses."""
        inputs = model_inputs(batch, self.device)
        with self._output_loss(batch):
            logits: Tensor = self.deepspeed(**inputs, use_cache=False).logits
        return logits

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (a scalar, see the module's docstring) to this optimizer step's gradient."""
        self.deepspeed.backward(loss * self.averages_over * self._missing_loss_scale(), scale_wrt_gas=False)
        self._micro_steps += 1
        if self._micro_steps < self.config.accumulation:
            # DeepSpeed counts micro-batches in step(); only the last one of an optimizer step updates anything.
            self.deepspeed.step()

    def _missing_loss_scale(self) -> float:
        """Return fp16's loss scale at stage 0, where DeepSpeed does not apply it; otherwise return 1.

        DeepSpeed 0.19.8 still divides the gradients by it (65,536 at first, by default). Without this factor
        they would be too small: nothing would be clipped, and small ones would vanish in fp16 (DeepSpeed pull request
        8393).
        """
        engine = self.config.engine
        return float(self.deepspeed.optimizer.loss_scale) if (engine.precision, engine.zero_stage) == ("fp16", 0) else 1

    def step(self) -> float:
        """Clip, update, clear the gradients, and advance the schedule unless the update was skipped.

        Returns:
            The gradient's global 2-norm before clipping; infinite if DeepSpeed skipped the update (fp16 overflow).
        """
        self._micro_steps = 0
        norm: Any = self._norm_without_zero() if self.deepspeed.optimizer is self.optimizer else None
        scale = self._missing_loss_scale()
        self.deepspeed.step()
        if not self.update_was_skipped:
            self.schedule.step()
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
            norm = norm and norm / scale  # stage 0 reports the norm of the scaled gradients
        # ZeRO reports a norm that is not a number as -1.
        return math.nan if norm is None or float(norm) < 0 else float(norm)

    @property
    def update_was_skipped(self) -> bool:
        """Return True if the last :meth:`step` changed nothing because fp16 gradients overflowed."""
        return self.config.engine.precision == "fp16" and not self.deepspeed.was_step_applied()

    def _norm_without_zero(self) -> float:
        # Stage 0 in fp32 does not wrap the optimizer and reports no norm. The gradients are already averaged. Each rank
        # has only its share of a split parameter's gradient; replicated gradients must count once.
        gradients = [(p.grad, self._dims[p] is None) for p in self.module.parameters() if p.grad is not None]
        full, shares = ([g for g, replicated in gradients if replicated is wanted] for wanted in (True, False))
        norms = torch.tensor([global_norm(full), global_norm(shares)], dtype=torch.float64, device=self.device)
        if self.unit:
            squares = norms[1:].square()
            torch.distributed.all_reduce(squares, group=self.unit.get_model_parallel_group())
            norms[1:] = squares.sqrt()
        return float(norms.norm())

    def undo_step_of_construction(self) -> None:
        """Undo the step on zero gradients that DeepSpeed's 16-bit optimizer takes at stage 0 when it is built.

        It takes the step to allocate Adam's moments. That decays the fp32 weights and leaves Adam's step count at 1,
        which shrinks the first real update to three quarters.
        """
        self.optimizer.state.clear()
        wrapper = self.deepspeed.optimizer
        for masters, copies in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, copy in zip(masters, copies, strict=True):
                master.data.copy_(copy.data)

    def state_tensors(self) -> dict[str, list[Tensor]]:
        """Return the tensors of this rank's model states by part: ``parameters``, ``gradients``, ``optimizer``.

        ``optimizer`` holds the moments and, if DeepSpeed keeps one, the fp32 master copy. Offloaded tensors are
        included; their device tells where they are.
        """
        return held_tensors(self.deepspeed, self.optimizer)

    def layout(self) -> list[ParameterLayout]:
        """Return AutoTP's layout of each parameter, in the model's order."""
        return autotp.parameter_layouts(self.module)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every full parameter, one at a time, in fp32 on the CPU. Collective: all ranks must iterate."""
        return self._full_states.parameters()

    def full_optimizer_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield both full moments of every trained parameter, on the CPU. Collective: all ranks must iterate."""
        return self._full_states.moments()

    def save(self, directory: Path, writer: Writer) -> None:
        """Write this rank's files into ``directory``. Collective."""
        self.deepspeed.checkpoint_engine = _CheckpointEngine(writer)
        self.deepspeed.save_checkpoint(str(directory), tag=_TAG, save_latest=False)
        if self.unit and self.unit.topology.rank == 0:
            rows = [asdict(row) for row in self.layout()]
            (directory / LAYOUT).write_text(json.dumps(rows, indent=1), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Restore weights and optimizer states. Collective.

        Raises:
            CheckpointError: there is nothing to load. DeepSpeed then returns ``None`` or fails a bare assertion.
        """
        path = None
        if any((directory / _TAG).glob("*.pt")):
            path, _ = self.deepspeed.load_checkpoint(str(directory), tag=_TAG)
        if path is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {directory}; the run was not resumed.")

    def load_full(self, full: FullTensors) -> None:
        """Restore weights and optimizer states that any engine saved, in any shape. Every rank reads all of them."""
        self._full_states.load(full)

    def close(self) -> None:
        """Release the model, hooks and buffers, so that another engine can be built in the same process."""
        self.deepspeed.destroy()
        forget_module(self.module)
        _share_groups(None)


class _CheckpointEngine(TorchCheckpointEngine):
    """Checkpoint engine that hands DeepSpeed's files to our writer, which decides when to write them."""

    def __init__(self, writer: Writer) -> None:
        super(TorchCheckpointEngine, self).__init__()
        self.name, self.writer = "tutorial_lib", writer

    def save(self, state_dict: Any, path: str) -> None:
        self.writer.save(state_dict, Path(path))


def held_tensors(engine: Any, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """Return the tensors of a rank's model states by part, as :meth:`DeepSpeedEngine.state_tensors` describes them.

    Args:
        engine: the engine that ``deepspeed.initialize`` returned.
        optimizer: the PyTorch optimizer that DeepSpeed wrapped.
    """
    wrapper, model = engine.optimizer, engine.module
    parameters = [p.data for p in model.parameters()]
    # At stage 3, add this rank's shards to the gathered and persistent parameters. Freed parameters are empty.
    parameters += [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients += _tensors(getattr(wrapper, "averaged_gradients", None))
    for masters in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        # If the optimizer is offloaded, gradients are kept next to the master copy.
        gradients += [flat.grad for flat in getattr(wrapper, masters, []) if flat.grad is not None]
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    for masters in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups"):
        states += _tensors(getattr(wrapper, masters, None))
    return {"parameters": parameters, "gradients": gradients, "optimizer": [t for t in states if t.dim() > 0]}


def forget_module(model: torch.nn.Module) -> None:
    """Drop the last reference to a destroyed stage-3 engine's model, which DeepSpeed keeps in a global list."""
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not model]


def join_process_group() -> None:
    """Let DeepSpeed use the existing process group, for an engine that the Hugging Face Trainer builds.

    At stage 3, call this before the model is built: without a group, DeepSpeed would see a single rank.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_init_required=False)
    _share_groups(None)


def _share_groups(unit: ModelParallelUnit | None) -> None:
    """Make DeepSpeed use the grid's groups, or none.

    DeepSpeed keeps its groups in global variables. By default it would create the same groups again, and a later run in
    this process would find the groups of the previous run.
    """
    groups.mpu = None
    groups._DATA_PARALLEL_GROUP = unit and unit.get_data_parallel_group()
    groups._MODEL_PARALLEL_GROUP = groups._TENSOR_MODEL_PARALLEL_GROUP = unit and unit.get_model_parallel_group()


_HIDDEN_FROM_TRANSFORMERS = ("tensor_parallel", "train_batch_size", "gradient_accumulation_steps")


@contextmanager
def _partition_at_construction(settings: dict[str, Any]) -> Iterator[None]:
    """Partition every parameter over all ranks as soon as it is created, if this is stage 3."""
    if settings["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # transformers only needs to know the stage. With the AutoTP section it would refuse to load weights, although
    # AutoTP splits them later. Batch sizes would be checked against the number of all ranks, over which the model is
    # partitioned here, instead of the data-parallel size.
    visible = {key: value for key, value in settings.items() if key not in _HIDDEN_FROM_TRANSFORMERS}
    keep_alive = HfDeepSpeedConfig(visible)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


def _adamw(parameters: list[torch.nn.Parameter], o: OptimizerConfig, engine: EngineConfig) -> torch.optim.Optimizer:
    if engine.offload == "none":
        return torch.optim.AdamW(parameters, **o.adamw)
    # With offload, DeepSpeed refuses torch's AdamW: its own CPU Adam is vectorised for the host's processor.
    return DeepSpeedCPUAdam(parameters, adamw_mode=True, **o.adamw)


def _tensors(nested: Any) -> list[Tensor]:
    if torch.is_tensor(nested):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    if isinstance(nested, (list, tuple)) or hasattr(nested, "__iter__"):
        return [tensor for item in nested for tensor in _tensors(item)]
    return []
