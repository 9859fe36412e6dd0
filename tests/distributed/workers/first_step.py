"""First-step worker, for ``test_split_loss.py``: each run trains one step on a fixed batch, and measures a second one.

The first rank writes ``first-step.pt`` in a run's directory, with the loss and full gradients of the first step, and
the peak of the memory that forward and backward allocate in the second.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from tutorial_lib.config import Config
from tutorial_lib.engine import build_engine
from tutorial_lib.launch import worker
from tutorial_lib.measure.memory import count_allocations
from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer import token_loss_sum

ROWS, TOKENS = 4, 128


def main(*arguments: str) -> None:
    worker.main(*arguments, train=lambda configs: [train(config) for config in configs])


def train(config: Config) -> None:
    """Train a step, run the passes of a second one, and save the first rank's measurements. Collective."""
    topology = Topology.from_environment(config.parallel)
    engine = build_engine(config, topology, num_steps=2)
    batch = fixed_batch(engine.module.config.vocab_size)
    engine.train(True)
    loss = forward_and_backward(engine, batch)
    engine.step()
    # After one step, Adam's first moment is the gradient times 1 - beta1.
    share = 1 - config.optimizer.beta1
    gradients = {name: moments["exp_avg"] / share for name, moments in engine.full_optimizer_states()}
    with count_allocations() as allocations:
        forward_and_backward(engine, batch)
    engine.close()
    if topology.rank == 0:
        run = RunDirectory(config.directory)
        run.create()
        seen = {"loss": loss, "gradients": gradients, "peak": allocations.peak["cpu"]}
        torch.save(seen, run.path / "first-step.pt")
        run.result_file.write_text("{}")  # the launcher expects a finished run to have a result


def fixed_batch(vocabulary: int) -> dict[str, torch.Tensor]:
    """Return the same batch on every rank. A quarter of its tokens do not enter the loss."""
    labels = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": labels.clone(), "attention_mask": torch.ones_like(labels), "labels": labels}
    batch["labels"][:, : TOKENS // 4] = -100
    return batch


def forward_and_backward(engine: Any, batch: dict[str, torch.Tensor]) -> float:
    loss = token_loss_sum(engine.forward(batch), batch["labels"]) / (ROWS * TOKENS)
    engine.backward(loss)
    return float(loss.detach())


if __name__ == "__main__":
    main(*sys.argv[1:])
