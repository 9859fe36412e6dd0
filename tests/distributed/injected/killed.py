"""Kills: a rank gets SIGKILL in a pass, in the update, or at a stage of a save."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem

from tests.late_writes import late_writes
from tutorial_lib import checkpoint
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer import loop as trainer

STEP = 4
"""Step of the kill: two steps after the only checkpoint, so that one finished step is lost as well."""


def kill_this_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def in_forward() -> Iterator[None]:
    """Kill rank 1 in the middle of the model, in a forward pass."""
    with _in_the_middle_of_the_model(lambda output: kill_this_rank()):
        yield


@contextmanager
def in_backward() -> Iterator[None]:
    """Kill rank 1 in the middle of the model, in a backward pass."""
    with _in_the_middle_of_the_model(lambda output: output.register_hook(lambda gradient: kill_this_rank())):
        yield


def _in_the_middle_of_the_model(strike: Callable[[torch.Tensor], object]) -> AbstractContextManager[object]:
    """Call a function of the middle layer's output on rank 1, in the forward pass of step :data:`STEP`."""
    build, passes = trainer.build_engine, []

    def passing(layer: Any, given: Any, output: Any) -> None:
        passes.append(layer)
        if len(passes) == STEP and dist.get_rank() == 1:
            strike(output if torch.is_tensor(output) else output[0])

    def built(*args: Any) -> Any:
        engine = build(*args)
        layers = next(module for module in engine.module.modules() if isinstance(module, torch.nn.ModuleList))
        layers[len(layers) // 2].register_forward_hook(passing)
        return engine

    return mock.patch.object(trainer, "build_engine", built)


@contextmanager
def in_update() -> Iterator[None]:
    """Kill rank 1 when AdamW has updated its shard, but no other rank has the new weights yet."""
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
def in_save() -> Iterator[None]:
    """Kill rank 1 in the second checkpoint, when its own files are written but the rest is not."""
    with in_second_save(kill_this_rank):
        yield


def in_second_save(strike: Callable[[], None]) -> AbstractContextManager[object]:
    """Call a function on rank 1 in the second checkpoint, when its own files are written but the rest is not."""
    from tutorial_lib.engine.deepspeed.engine import DeepSpeedEngine

    save, saves = DeepSpeedEngine.save, []

    def saving(self: Any, directory: Path, *given: Any) -> None:
        save(self, directory, *given)
        saves.append(directory)
        if len(saves) == 2 and dist.get_rank() == 1:
            strike()

    return mock.patch.object(DeepSpeedEngine, "save", saving)


@contextmanager
def in_publish() -> Iterator[None]:
    """Kill rank 0 when its second checkpoint is complete, but still has its temporary name."""
    publish, published = checkpoint.saver.publish, []

    def publishing(partial: Path, final: Path) -> None:
        published.append(final)
        if len(published) == 2:
            kill_this_rank()
        publish(partial, final)

    with mock.patch.object(checkpoint.saver, "publish", publishing):
        yield


@contextmanager
def in_prune() -> Iterator[None]:
    """Kill rank 0 when an old checkpoint has lost its name and one of its files."""
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
    """Kill rank 0 when half of a metrics row is in its file."""
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
def in_write() -> Iterator[None]:
    """Kill rank 1 halfway through a file of the second checkpoint, which is written in the background."""
    with in_second_write(_kill_in_the_next_file):
        yield


def in_second_write(strike: Callable[[], None]) -> AbstractContextManager[object]:
    """Call a function on rank 1 before the second checkpoint's files are written, in the background."""

    def second(step: int) -> None:
        if step == STEP and dist.get_rank() == 1:
            strike()

    return late_writes(second)


def _kill_in_the_next_file() -> None:
    create = FileSystem.create_stream

    @contextmanager
    def creating(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        with create(self, path, mode) as stream:
            yield _HalfWritten(stream)

    FileSystem.create_stream = creating  # type: ignore[method-assign]


class _HalfWritten:
    """A file whose process is killed when half of the first write is in it."""

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
