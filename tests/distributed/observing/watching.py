"""Observation of a run's engine, examples, tokens and files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from tutorial_lib import checkpoint
from tutorial_lib.measure.memory import StateBytes, count_allocations
from tutorial_lib.trainer import Trainer, count_targets


class Watch:
    """The engine of a run, the batches that its loader yields, and the files that are written."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.inputs: dict[str, Tensor] = {}
        self.written: set[str] = set()
        self.steps: list[list[str]] = []
        self.tokens: list[int] = []

    def watched(self, trainer_class: type[Trainer]) -> type[Trainer]:
        """Return a trainer of the same kind whose engine and batches are recorded."""
        watch = self

        class Watched(trainer_class):
            def build_engine(self) -> Any:
                watch.engine = super().build_engine()
                return watch.engine

            def train_step(self, micro_batches: list[dict[str, Tensor]]) -> None:
                watch.read(micro_batches)
                super().train_step(micro_batches)

        return Watched

    def read(self, micro_batches: list[dict[str, Tensor]]) -> None:
        """Record the batches of a step."""
        self.inputs = self.inputs or {k: t[:2] for k, t in micro_batches[0].items() if k != "labels"}
        self.steps.append([example for batch in micro_batches for example in examples_of(batch)])
        self.tokens.append(own_tokens(micro_batches))

    def save(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def saving(content: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            self._writes(target)
            return save(content, target, *args, **kwargs)

        return saving

    def stream(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Record the files that ``torch.distributed.checkpoint`` opens, whose names ``torch.save`` does not see."""

        def creating(file_system: Any, path: Any, mode: str) -> Any:
            if "w" in mode:
                self._writes(path)
            return create(file_system, path, mode)

        return creating

    def _writes(self, target: Any) -> None:
        path = target if isinstance(target, (str, Path)) else getattr(target, "name", None)
        parts = Path(path).parts if isinstance(path, (str, Path)) else ()
        if "checkpoints" in parts:
            # The path below checkpoints/.partial-step-NNNNNNNN-TOKEN.
            self.written.add("/".join(parts[parts.index("checkpoints") + 2 :]))

    def observation(self) -> dict[str, Any]:
        """Return the observation of all ranks, with the inputs and logits of this rank alone. Collective."""
        parameters = dict(self.engine.full_parameters())
        moments = dict(self.engine.full_optimizer_states())
        everything = [*parameters.values(), *(m for both in moments.values() for m in both.values())]
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (self.steps, self.tokens, digest_of(everything), sorted(self.written)))
        measuring = self.engine.config.run.measure
        # Ranks of one tensor-parallel group are adjacent, and read the same examples.
        readers = shares[:: self.engine.config.parallel.tp]
        self.engine.train(False)
        with torch.no_grad(), count_allocations() if measuring else nullcontext() as allocations:
            # A start that stops at once has read no batch.
            logits = self.engine.forward(self.inputs) if self.inputs else torch.empty(0)
        return {
            "parameters": parameters,
            "moments": moments,
            "inputs": self.inputs,
            "logits": logits.clone(),
            "evaluation": {
                "peak": allocations.peak["cpu"],
                "parameters_after": StateBytes.of(self.engine.state_tensors()).parameters,
            }
            if measuring
            else None,
            "examples": [
                sorted(e for rank in step for e in rank) for step in zip(*(s[0] for s in readers), strict=True)
            ],
            "tokens_by_rank": [tokens for _, tokens, _, _ in readers],
            "ranks_agree": len({digest for _, _, digest, _ in shares}) == 1,
            "files_by_rank": [files for _, _, _, files in shares],
        }

    def load_of_nothing(self, directory: Path) -> str:
        """Return the engine's error for an empty directory. Do not use the engine afterwards. Collective."""
        directory.mkdir(exist_ok=True)
        try:
            self.engine.load(directory)
        except checkpoint.CheckpointError as error:
            return str(error)
        return "nothing was loaded, and no error was raised"


@contextmanager
def watching() -> Iterator[Watch]:
    watch = Watch()
    with (
        mock.patch.object(torch, "save", watch.save(torch.save)),
        mock.patch.object(FileSystem, "create_stream", watch.stream(FileSystem.create_stream)),
    ):
        yield watch


def examples_of(batch: dict[str, Tensor]) -> list[str]:
    """Return a fingerprint of every row of a batch, without its padding."""
    mask = batch["attention_mask"]
    width = mask.sum(-1) if mask.dim() == 2 else torch.full((mask.size(0),), mask.size(-1))
    return [digest_of([ids[:n]]) for ids, n in zip(batch["input_ids"], width.tolist(), strict=True)]


def digest_of(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def own_tokens(micro_batches: Sequence[dict[str, Tensor]]) -> int:
    """Return how many tokens of this rank count in the loss."""
    return sum(count_targets(batch["labels"]) for batch in micro_batches)
