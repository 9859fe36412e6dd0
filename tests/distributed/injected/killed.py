"""SIGKILL of a rank in a pass, in the update, or at a stage of a save."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem

from tests.support.late_writes import LateTrainer
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer import Trainer

STEP = 4
"""Step of the kill, which is two steps after the only checkpoint, so that one finished step is lost as well."""


def kill_this_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def in_forward() -> Iterator[type[Trainer]]:
    """Kill rank 1 in the middle of the model, in a forward pass."""
    yield trainer_with_middle_layer_hook(lambda output: kill_this_rank())


@contextmanager
def in_backward() -> Iterator[type[Trainer]]:
    """Kill rank 1 in the middle of the model, in a backward pass."""
    yield trainer_with_middle_layer_hook(lambda output: output.register_hook(lambda gradient: kill_this_rank()))


def trainer_with_middle_layer_hook(hook: Callable[[torch.Tensor], object]) -> type[Trainer]:
    """Return a trainer that calls ``hook`` with the middle layer's output on rank 1, in step 4's forward pass."""

    class HookedTrainer(Trainer):
        def build_engine(self) -> Any:
            engine, passes = super().build_engine(), []

            def passing(layer: Any, given: Any, output: Any) -> None:
                passes.append(layer)
                if len(passes) == STEP and self.topology.rank == 1:
                    hook(output if torch.is_tensor(output) else output[0])

            layers = next(module for module in engine.module.modules() if isinstance(module, torch.nn.ModuleList))
            layers[len(layers) // 2].register_forward_hook(passing)
            return engine

    return HookedTrainer


@contextmanager
def in_update() -> Iterator[None]:
    """Kill rank 1 after AdamW has updated its shard, but before other ranks have the new weights."""
    step, steps = torch.optim.AdamW.step, []

    def updating(self: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = step(self, *args, **kwargs)
        steps.append(self)
        if len(steps) == STEP and dist.get_rank() == 1:
            kill_this_rank()
        return outcome

    with mock.patch.object(torch.optim.AdamW, "step", updating):
        yield


@contextmanager
def in_save() -> Iterator[type[Trainer]]:
    """Kill rank 1 during the second save, after it has written its own files but before the save is complete."""
    yield trainer_with_second_save_hook(kill_this_rank)


def trainer_with_second_save_hook(hook: Callable[[], None]) -> type[Trainer]:
    """Return a trainer that calls a function on rank 1 after its own files of the second checkpoint are written."""

    class HookedTrainer(Trainer):
        def build_engine(self) -> Any:
            engine, saves = super().build_engine(), []
            save = engine.save

            def saving(directory: Path, *given: Any) -> None:
                save(directory, *given)
                saves.append(directory)
                if len(saves) == 2 and self.topology.rank == 1:
                    hook()

            engine.save = saving
            return engine

    return HookedTrainer


@contextmanager
def in_publish() -> Iterator[None]:
    """Kill rank 0 when its second checkpoint is complete, but still has its temporary name."""
    rename, complete = os.rename, []

    def renaming(old: Any, new: Any) -> None:
        if Path(old).name.startswith(".partial-"):
            complete.append(new)
            if len(complete) == 2:
                kill_this_rank()
        rename(old, new)

    with mock.patch.object(os, "rename", renaming):
        yield


@contextmanager
def in_prune() -> Iterator[None]:
    """Kill rank 0 after it has renamed an old checkpoint and deleted one of its files."""
    remove = shutil.rmtree

    def removing(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith(".deleting-"):
            next(Path(path).rglob("*.pt")).unlink()
            kill_this_rank()
        remove(path, *args, **kwargs)

    with mock.patch.object(shutil, "rmtree", removing):
        yield


@contextmanager
def in_report() -> Iterator[None]:
    """Kill rank 0 after it has written half of a row of metrics."""
    append = RunDirectory.append

    def appending(self: RunDirectory, row: dict[str, Any]) -> None:
        if row["step"] < STEP:
            return append(self, row)
        line = json.dumps(row)
        with self.metrics_file.open("a") as file:
            file.write(line[: len(line) // 2])
        kill_this_rank()

    with mock.patch.object(RunDirectory, "append", appending):
        yield


@contextmanager
def in_write() -> Iterator[type[Trainer]]:
    """Kill rank 1 halfway through a file of the second checkpoint, which is written in the background."""
    yield trainer_with_second_write_hook(_kill_in_the_next_file)


def trainer_with_second_write_hook(hook: Callable[[], None]) -> type[Trainer]:
    """Return a trainer that calls a function on rank 1 before it writes the second checkpoint in the background."""

    class HookedTrainer(LateTrainer):
        def before_a_write(self, step: int) -> None:
            if step == STEP and self.topology.rank == 1:
                hook()

    return HookedTrainer


def _kill_in_the_next_file() -> None:
    create = FileSystem.create_stream

    @contextmanager
    def creating(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        with create(self, path, mode) as stream:
            yield _HalfWritten(stream)

    FileSystem.create_stream = creating  # type: ignore[method-assign]


class _HalfWritten:
    """A file whose process is killed halfway through the first write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        self._stream.write(data[: len(data) // 2])
        self._stream.flush()
        kill_this_rank()
        return 0
