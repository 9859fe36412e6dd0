"""Memory worker, for ``test_memory_at_start.py``: each rank builds an engine and watches its memory, without training.

``memory.json`` in a run's directory holds, for every rank, by how many bytes its resident set rose while the model was
built or read (``loading``), and until the engine was ready (``initializing``). ``..._anonymous`` are the same without
the pages of mapped files.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist

from tutorial_lib.config import Config
from tutorial_lib.engine import build_engine
from tutorial_lib.engine.deepspeed import engine
from tutorial_lib.engine.fsdp import weights
from tutorial_lib.launch import worker
from tutorial_lib.measure.memory import peak_memory, reset_peak_memory
from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory


def main(*arguments: str) -> None:
    worker.main(*arguments, train=lambda configs: [build_and_measure(config) for config in configs])


def build_and_measure(config: Config) -> None:
    """Build the engine of a run, and measure the memory that this takes. Collective."""
    seen: dict[str, int] = {}

    def watched(load: Any) -> Any:
        def loading(*args: Any, **kwargs: Any) -> Any:
            with _peaks("loading", seen):
                return load(*args, **kwargs)

        return loading

    topology = Topology.create(config.parallel, rank=dist.get_rank(), world_size=dist.get_world_size())
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    dist.barrier()
    with (
        _peaks("initializing", seen),
        mock.patch.object(engine, "build_model", watched(engine.build_model)),
        mock.patch.object(weights, "fill_model", watched(weights.fill_model)),
    ):
        built = build_engine(config, topology, num_steps=1)
    seen["num_parameters"] = built.num_parameters
    built.close()
    del built
    by_rank: list[Any] = [None] * topology.world_size
    dist.all_gather_object(by_rank, seen)
    if topology.rank == 0:
        run = RunDirectory(config.directory)
        run.create()
        (run.path / "memory.json").write_text(json.dumps(by_rank))
        # The launcher expects a result of a run that has ended.
        run.result_file.write_text("{}")
    dist.barrier()


@contextmanager
def _peaks(phase: str, seen: dict[str, int]) -> Iterator[None]:
    done, anonymous = threading.Event(), [_anonymous()]

    def watch() -> None:
        while not done.wait(0.005):
            anonymous.append(_anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = psutil.Process().memory_info().rss
    reset_peak_memory(torch.device("cpu"))
    yield
    seen[phase] = peak_memory(torch.device("cpu")) - before
    done.set()
    thread.join()
    seen[f"{phase}_anonymous"] = max(anonymous) - anonymous[0]


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
