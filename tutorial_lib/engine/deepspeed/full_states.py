"""Full parameters and moments of a DeepSpeed engine: gathered from its ranks, or cut up for them.

Callers such as a reshape see full tensors one at a time. A rank holds its share of a parameter (AutoTP), and its piece
of that share (ZeRO), in up to four places: the weights that the model computes with (possibly in 16 bits), the fp32
master copy, and both moments. From stage 1 on, the last three are slices of long vectors
(:mod:`tutorial_lib.engine.deepspeed.partitions`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor

from tutorial_lib.checkpoint import MOMENTS, FullTensors
from tutorial_lib.engine.deepspeed import partitions
from tutorial_lib.mpu import ModelParallelUnit


class FullStates:
    """Reads and writes the states of one engine as full tensors.

    Args:
        engine: the engine that ``deepspeed.initialize`` returned.
        optimizer: the PyTorch optimizer that DeepSpeed wrapped.
        stage: the ZeRO stage.
        unit: the tensor-parallel unit, or None without tensor parallelism.
        dims: for each parameter, the dimension that AutoTP splits it along; None if each rank has all of it.
        device: where the ranks exchange tensors.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        stage: int,
        unit: ModelParallelUnit | None,
        dims: Mapping[torch.nn.Parameter, int | None],
        device: torch.device,
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._stage = stage
        self._unit = unit
        self._dims = dims
        self._device = device

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every full parameter, one at a time, in fp32 on the CPU. Collective: all ranks must iterate."""
        for name, parameter in self._engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                yield name, self._gather_over_tp(parameter, parameter).detach().to("cpu", torch.float32, copy=True)

    def moments(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield both full moments of every trained parameter, on the CPU. Collective: all ranks must iterate."""
        keys = self._optimizer_keys() if self._stage == 0 else None
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                if keys is not None:
                    state = self._optimizer.state[keys[parameter]]
                    moments = {key: state[key] for key in MOMENTS}
                else:
                    moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                yield (
                    name,
                    {key: self._gather_over_tp(parameter, m).detach().cpu().clone() for key, m in moments.items()},
                )

    @torch.no_grad()
    def load(self, full: FullTensors) -> None:
        """Restore weights, buffers and optimizer states that any engine saved, in any shape. Every rank reads all.

        Adam counts updates once per vector, so the count of a vector's first parameter stands for all of them.
        """
        full.restore_buffers(self._engine.module)
        wrapper = self._engine.optimizer
        if self._stage == 3:
            wrapper.checkpoint_event_prologue()  # frees gathered parameters
        pieces = self._pieces()
        for name, parameter in self._engine.module.named_parameters():
            share = self._share(parameter, full.parameter(name))
            if self._stage == 3:
                partitions.fill_shard(parameter, share)
            else:
                parameter.copy_(share)
            if parameter.requires_grad:
                piece = pieces[parameter]
                state = self._state_of(piece.vector, full.adam_step(name))
                piece.fill(piece.vector, share)
                for moment in MOMENTS:
                    piece.fill(state[moment], self._share(parameter, full.moment(name, moment)))
        if self._stage in (1, 2):
            wrapper._lazy_init_hp_params_optimizer_state()  # links parameters to their moments
        if self._stage == 3:
            wrapper.checkpoint_event_epilogue()  # small parameters are gathered again

    def _gather_over_tp(self, parameter: torch.nn.Parameter, share: Tensor) -> Tensor:
        """All-gather the full tensor from this rank's share of a parameter, gradient or moment. Collective."""
        dim = self._dims[parameter]
        if self._unit is None or dim is None:
            return share
        # Offloaded tensors are in host memory, but the ranks exchange tensors on their devices.
        own = share.detach().to(self._device).contiguous()
        shares = [torch.empty_like(own) for _ in range(self._unit.topology.tp)]
        torch.distributed.all_gather(shares, own, group=self._unit.get_model_parallel_group())
        return torch.cat(shares, dim)

    def _share(self, parameter: torch.nn.Parameter, tensor: Tensor) -> Tensor:
        """Return this rank's share of a full tensor: the inverse of :meth:`_gather_over_tp`."""
        dim = self._dims[parameter]
        if self._unit is None or dim is None:
            return tensor
        return tensor.chunk(self._unit.topology.tp, dim)[self._unit.topology.tp_rank]

    def _optimizer_keys(self) -> dict[Tensor, Tensor]:
        """Map each trained parameter to its optimizer key without ZeRO: itself, or its master copy in 16-bit runs."""
        wrapper = self._engine.optimizer
        if wrapper is self._optimizer:
            return {parameter: parameter for parameter in self._engine.module.parameters()}
        copies = [copy for group in wrapper.fp16_groups for copy in group]
        masters = [master for group in wrapper.fp32_groups for master in group]
        return dict(zip(copies, masters, strict=True))

    def _pieces(self) -> dict[Tensor, partitions.Piece]:
        if self._stage > 0:
            return dict(partitions.pieces(self._engine.optimizer, self._stage))
        keys = self._optimizer_keys()
        return {parameter: partitions.Piece(key, 0, 0, key.numel()) for parameter, key in keys.items()}

    def _state_of(self, vector: Tensor, step: int) -> dict[str, Any]:
        """Return the optimizer's state for a vector that it updates, allocated as in its first step."""
        state: dict[str, Any] = self._optimizer.state[vector]
        if not state:
            offloaded = isinstance(self._optimizer, DeepSpeedCPUAdam)
            state["step"] = step if offloaded else torch.tensor(float(step))
            state.update({moment: torch.zeros_like(vector) for moment in MOMENTS})
        return state
