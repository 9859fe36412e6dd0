"""Step probe: activations of a model whose tensors can be counted by hand, and the step that a start measures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.torch_runs import config
from tutorial_lib import trainer
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


def measured_step(storage: Path, model: str, **flat: Any) -> int | None:
    """Start a run of six steps, and return the step that its result has measurements of."""
    (rank,) = trainer.train(config(storage, model=model, steps=6, **flat)).ranks
    return rank["measured"] and rank["measured"]["step"]


@pytest.mark.parametrize("engine", ["torch", "trainer"])
def test_each_start_measures_its_third_step_or_its_last(model: str, tmp_path: Path, engine: str) -> None:
    measuring = {"engine": engine, "measure": True}
    assert measured_step(tmp_path, model, **measuring, stop_after=1) == 1
    assert measured_step(tmp_path, model, **measuring, stop_after=5) == 4
    assert measured_step(tmp_path, model, **measuring) == 6
    for again in (True, False):
        assert measured_step(tmp_path, model, engine=engine, measure=again) == 6, (
            "no step is left, and the old ones stay"
        )


def test_measurements_with_other_settings_are_not_kept(model: str, tmp_path: Path) -> None:
    assert measured_step(tmp_path, model, measure=True, stop_after=5) == 3
    assert measured_step(tmp_path, model) == 3
    assert measured_step(tmp_path, model, micro_batch=1) is None


def test_a_damaged_result_does_not_stop_a_resume(model: str, tmp_path: Path) -> None:
    assert measured_step(tmp_path, model, measure=True, stop_after=5) == 3
    result = next(tmp_path.rglob("result.json"))
    result.write_text(result.read_text().replace("measured", "meazured"))
    assert measured_step(tmp_path, model) is None
