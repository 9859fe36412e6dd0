"""FSDP2 and DTensor behind the engine protocol.

Shape legend: B sequences of a micro-batch, S tokens, V vocabulary.

The training loop passes a loss that is divided by the optimizer step's token count over *all* ranks and micro-batches.
FSDP2 and DDP average gradients over the data-parallel ranks, so :meth:`FSDPEngine.backward` multiplies the loss by
their number first. Tensor-parallel ranks compute one gradient together and average nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tutorial_lib.checkpoint import MOMENTS, FullTensors
from tutorial_lib.checkpoint.rank_writer import Writer
from tutorial_lib.config import Config, OptimizerConfig
from tutorial_lib.engine.chunked_loss import output_loss
from tutorial_lib.engine.fsdp import dcp, sharding, tensor_parallel, weights
from tutorial_lib.engine.learning_rate import Schedule
from tutorial_lib.engine.parameter_layout import ParameterLayout
from tutorial_lib.engine.single import model_inputs
from tutorial_lib.models.fused_qkv import by_part, is_fused_by_part
from tutorial_lib.models.meta import model_outline
from tutorial_lib.mpu import Topology


class FSDPEngine:
    """One rank's share of a model that PyTorch shards. See :class:`tutorial_lib.engine.Engine`.

    Args:
        config: what to run; ``config.engine`` decides strategy, precision and offload.
        topology: this rank's place in the grid.
        device: where forward and backward happen.

    The process group must exist.
    """

    update_was_skipped = False
    schedule: Schedule

    def __init__(self, config: Config, topology: Topology, device: torch.device) -> None:
        self.config, self.device = config, device
        self.averages_over = topology.dp
        self._world_size = topology.world_size
        model: Any = model_outline(config.model, config.engine)
        self._output_loss = output_loss(model, config.engine.loss_chunks)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        dp_mesh, tp_mesh = sharding.meshes(config.engine, topology, device.type)
        if topology.tp > 1:
            tensor_parallel.split_model(model, tp_mesh, config.engine.tp_plan)
        replicated = config.engine.sharding == "no_shard"
        if not replicated:
            sharding.shard_model(model, config.engine, dp_mesh)
        on_host = config.engine.offload == "all"
        weights.fill_model(model, config.model, seed=config.run.seed, device=device, host=on_host)
        self.module: torch.nn.Module = model
        self._model_type: str = model.config.model_type
        self._parallel: Any = sharding.data_parallel(model, dp_mesh) if replicated else model
        self.optimizer = _adamw(model, config.optimizer)
        # With async_save, ranks exchange write plans on the CPU while they train, in a group of their own.
        self._writers_group = dist.new_group(backend="gloo") if config.run.async_save else None
        self._micro_steps = 0

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of a batch, shape (B, S, V), or with ``loss_chunks`` the sum of its losses.

        In bf16 the weights stay fp32: FSDP2 gathers bf16 copies, and DDP uses autocast.
        """
        inputs = model_inputs(batch, self.device)
        bf16 = self.config.engine.precision == "bf16" and not self._is_fsdp
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        with self._reduction(), autocast, self._output_loss(batch):
            logits: Tensor = self._parallel(**inputs, use_cache=False).logits
        if not torch.is_grad_enabled():
            sharding.free_gathered_parameters(self.module)
        return logits

    def _reduction(self) -> Any:
        """Reduce gradients in the backward pass of a step's last micro-batch, or of every one with ``reduce_each``.

        Gradients that wait for the last micro-batch are held in full: Psi elements on top of a rank's shard.
        """
        reduces = self.config.engine.reduce_each or self._micro_steps + 1 == self.config.accumulation
        if self._is_fsdp:
            self._parallel.set_requires_gradient_sync(reduces)
            return nullcontext()
        return nullcontext() if reduces else self._parallel.no_sync()

    def backward(self, loss: Tensor) -> None:
        (loss * self.averages_over).backward()
        self._micro_steps += 1

    def step(self) -> float:
        """Clip, update, clear the gradients, advance the schedule; return the gradient's 2-norm before clipping."""
        self._micro_steps = 0
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm, limit = self._global_norm(gradients), self.config.optimizer.gradient_clipping
        if limit > 0:
            factor = min(1.0, limit / (norm + 1e-6))
            for gradient in gradients:
                sharding.local_part(gradient).mul_(factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return norm

    def _global_norm(self, gradients: list[Tensor]) -> float:
        """Return the 2-norm of all gradients together, in fp64. Collective.

        ``torch.nn.utils.clip_grad_norm_`` cannot mix gradients on different meshes, and split and unsplit layers have
        different meshes. So every rank adds up the squares of its pieces, each divided by the number of ranks that hold
        the same piece, and the ranks add up their sums.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient in gradients:
            norm = torch.linalg.vector_norm(sharding.local_part(gradient), dtype=torch.float64)
            squares += norm.to(self.device) ** 2 / sharding.num_copies(gradient, self._world_size)
        dist.all_reduce(squares)
        return float(squares.sqrt())

    @property
    def _is_fsdp(self) -> bool:
        return self._parallel is self.module

    def state_tensors(self) -> dict[str, list[Tensor]]:
        """Return this rank's tensors by part. Shards may be padded, so measure their storages."""
        parameters = list(self.module.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return {
            "parameters": [sharding.local_part(p.detach()) for p in parameters],
            "gradients": [sharding.local_part(g) for g in gradients] + sharding.unreduced_gradients(self.module),
            "optimizer": [sharding.local_part(t) for t in states if t.dim() > 0],
        }

    def layout(self) -> list[ParameterLayout]:
        """Return the layout of each parameter on the ranks of its tensor-parallel group, in the model's order."""
        return tensor_parallel.parameter_layouts(self.module)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every full parameter, one at a time, in fp32 on the CPU. Collective: all ranks must iterate."""
        for name, parameter in self.module.named_parameters():
            yield name, self._full_tensor(name, parameter)

    def full_optimizer_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield both full moments of every trained parameter, on the CPU. Collective: all ranks must iterate."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                state = self.optimizer.state[parameter]
                yield name, {moment: self._full_tensor(name, state[moment]) for moment in MOMENTS}

    def _full_tensor(self, name: str, tensor: Tensor) -> Tensor:
        held = tensor.detach()
        full = held.full_tensor() if isinstance(held, DTensor) else held
        gathered = full.to("cpu", torch.float32, copy=True)
        if is_fused_by_part(name, self._model_type):
            return by_part(gathered, weights.tensor_parallel_size(tensor)).contiguous()
        return gathered

    def save(self, directory: Path, writer: Writer) -> None:
        """Write this rank's file into ``directory``. Collective."""
        dcp.save(directory, writer, self.module, self.optimizer, self._writers_group)

    def load(self, directory: Path) -> None:
        """Restore weights and optimizer states. Collective.

        Raises:
            CheckpointError: there is nothing to load.
        """
        dcp.load(directory, self.module, self.optimizer)

    def load_full(self, full: FullTensors) -> None:
        """Restore weights and optimizer states saved by an engine of any shape. Every rank reads all of them."""
        dcp.load_full(full, self.module, self.optimizer)

    def close(self) -> None:
        """Release everything that is not a tensor."""
        if self._writers_group is not None:
            dist.destroy_process_group(self._writers_group)


def _adamw(model: torch.nn.Module, optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """Build AdamW with a parameter group per mesh: one kernel cannot mix meshes.

    It is fused, because otherwise AdamW on GPUs updates all parameters at once and allocates an fp32 copy of them.
    """
    groups: dict[Any, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], **optimizer.adamw, fused=True)
