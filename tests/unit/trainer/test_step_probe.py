"""Step probe: activations of a model whose tensors can be counted by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tutorial_lib.mpu import Topology
from tutorial_lib.trainer.step_probe import StepProbe

ROWS, WIDTH = 8, 128


class Gathering(nn.Module):
    """A linear layer whose weight exists only from its forward pass on, as under ZeRO-3."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data = torch.ones(WIDTH, WIDTH)
        return x @ self.weight


@pytest.mark.parametrize("last", [nn.Linear(WIDTH, WIDTH), Gathering()])
def test_activations_are_what_backward_needs_without_parameters(last: nn.Module) -> None:
    """ReLU keeps its result, which is the next layer's input; the square keeps its base. The rest is freed."""
    module = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH), last)
    engine: Any = SimpleNamespace(module=module)
    probe = StepProbe(Topology(1, 1, rank=0))
    with probe.measuring():
        for rows in (ROWS, ROWS // 2):
            x = torch.ones(rows, WIDTH)
            with probe.forward(engine):
                loss = (module(x) ** 2).sum()
            loss.backward()
    hidden, input_of_last, squared, loss_itself = 4 * ROWS * WIDTH, ROWS * WIDTH, ROWS * WIDTH, 1
    assert probe.activation_bytes() == 4 * (hidden + input_of_last + squared + loss_itself)
