"""Reference engine: one plain PyTorch process behind the engine protocol.

Nothing here is distributed, sharded or fused. The losses, gradient norms, parameters and optimizer states of every
other engine are compared with the ones computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from tutorial_lib.checkpoint import MOMENTS, FullTensors
from tutorial_lib.checkpoint.rank_writer import Writer
from tutorial_lib.config import Config
from tutorial_lib.engine.chunked_loss import output_loss
from tutorial_lib.engine.learning_rate import Schedule
from tutorial_lib.engine.parameter_layout import ParameterLayout
from tutorial_lib.models import build_model
from tutorial_lib.mpu import Topology


def model_inputs(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch on the model's device, without the labels, which only the loss needs."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if name != "labels"}


def global_norm(gradients: list[Tensor]) -> float:
    """Return the 2-norm of all gradients together, summed in fp64: fp32 sums of a million squares are off by 1e-6."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    return float(torch.stack(norms).norm()) if norms else 0.0


class TorchEngine:
    """A model, ``torch.optim.AdamW`` and clipping on one device. See :class:`tutorial_lib.engine.Engine`."""

    averages_over = 1
    update_was_skipped = False
    schedule: Schedule

    def __init__(self, config: Config, topology: Topology, device: torch.device) -> None:
        self.config = config
        self.device = device
        model = build_model(config)
        self.module: torch.nn.Module = model
        torch.nn.Module.to(model, device)
        self._output_loss = output_loss(model, config.engine.loss_chunks)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, **config.optimizer.adamw)

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of a batch, shape (B, S, V), or with ``loss_chunks`` the sum of its losses.

        In bf16, the weights stay fp32, and autocast computes in bf16.
        """
        inputs = model_inputs(batch, self.device)
        precision = self.config.engine.precision
        autocast = torch.autocast(self.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        with autocast, self._output_loss(batch):
            logits: Tensor = self.module(**inputs, use_cache=False).logits
        return logits

    def backward(self, loss: Tensor) -> None:
        (loss * self.averages_over).backward()

    def step(self) -> float:
        """Clip, update, clear the gradients and advance the schedule; return the gradient's 2-norm before clipping."""
        limit = self.config.optimizer.gradient_clipping
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = global_norm(gradients)
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), limit, torch.tensor(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return norm

    def state_tensors(self) -> dict[str, list[Tensor]]:
        parameters = list(self.module.parameters())
        states = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return {
            "parameters": list(parameters),
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimizer": [t for t in states if t.dim() > 0],
        }

    def layout(self) -> list[ParameterLayout]:
        """Return the layout of every parameter: replicated, because nothing is split."""
        return [
            ParameterLayout(name, "replicated", None, tuple(p.shape), tuple(p.shape), 1, p.numel() * p.element_size())
            for name, p in self.module.named_parameters()
        ]

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, parameter.detach().to("cpu", torch.float32, copy=True)

    def full_optimizer_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                state = self.optimizer.state[parameter]
                yield name, {key: state[key].detach().cpu().clone() for key in MOMENTS}

    def save(self, directory: Path, writer: Writer) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        writer.save(self.module.state_dict(), directory / "model.pt")
        writer.save(self.optimizer.state_dict(), directory / "optimizer.pt")

    def load(self, directory: Path) -> None:
        self.module.load_state_dict(torch.load(directory / "model.pt", map_location=self.device, weights_only=True))
        self.optimizer.load_state_dict(
            torch.load(directory / "optimizer.pt", map_location=self.device, weights_only=True)
        )

    @torch.no_grad()
    def load_full(self, full: FullTensors) -> None:
        """Restore weights, buffers and optimizer states that any engine saved, in any shape."""
        full.restore_buffers(self.module)
        for name, parameter in self.module.named_parameters():
            parameter.copy_(full.parameter(name))
            if parameter.requires_grad:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(full.adam_step(name))),
                    **{key: torch.empty_like(parameter).copy_(full.moment(name, key)) for key in MOMENTS},
                }

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
