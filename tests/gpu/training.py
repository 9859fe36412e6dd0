"""Parts that the training steps share: model directories, full rows, the engine of a configuration, timed steps."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.gpu.cases import AT_END, Setting
from tutorial_lib.config import Config
from tutorial_lib.embedded import model_directory
from tutorial_lib.engine import Engine, build_engine
from tutorial_lib.launch.torchrun import process_group
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer import count_targets, token_loss_sum

DENSE_BF16_PEAK = {"H100": 989e12, "H200": 989e12}
"""Dense FLOP/s of the SXM modules, from NVIDIA's data sheets. PCIe and NVL cards match the names but are slower."""


def device_of(setting: Setting) -> torch.device:
    """Return the device to measure."""
    return torch.device("cuda", 0) if setting.device == "cuda" else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dense_peak(device: torch.device) -> float | None:
    """Return the bf16 FLOP/s of this GPU from its data sheet, or None if it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for model, peak in DENSE_BF16_PEAK.items() if model in name), None)


def matmul_peak(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Return the FLOP/s of the fastest of the square matrix products that are computed during this time."""
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    best, end = math.inf, time.perf_counter() + seconds
    out = torch.matmul(a, b)  # includes the library's start-up
    while best == math.inf or time.perf_counter() < end:
        synchronize(device)
        began = time.perf_counter()
        torch.matmul(a, b, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def write_model(setting: Setting, name: str, like: str, **dimensions: Any) -> str:
    """Write a model directory with a family's tokenizer and other dimensions, without weights, and return its path.

    Args:
        setting: the setting whose scratch directory is used.
        name: name of the directory.
        like: an embedded model of the family.
        dimensions: entries of its ``config.json`` to replace.
    """
    source, target = model_directory(like), setting.path(f"models/{name}")
    target.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (target / file).write_text((source / file).read_text())
    (target / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | dimensions))
    return str(target)


def full_rows(vocabulary: int, config: Config, device: torch.device) -> list[dict[str, Tensor]]:
    """Return an optimizer step's micro-batches of random tokens, in rows of ``seq_length`` tokens without padding."""
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (config.micro_batch, config.data.seq_length)
    ids = [torch.randint(vocabulary, shape, generator=generator).to(device) for _ in range(config.accumulation)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in ids]


def join_group(config: Config) -> Topology:
    """Join a process group as its only rank, like a run with ``launcher='none'``. All cases share the group."""
    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        directory = AT_END.enter_context(tempfile.TemporaryDirectory())
        AT_END.enter_context(process_group(config.run, f"file://{directory}/rendezvous"))
    return Topology.create(config.parallel, rank=0, world_size=1)


@contextmanager
def engine_of(config: Config, setting: Setting) -> Iterator[Engine]:
    """Build the engine that a configuration names, and release it at the end."""
    engine = build_engine(config, join_group(config), num_steps=config.run.steps or 1)
    try:
        yield engine
    finally:
        engine.close()


def train_step(
    engine: Engine, micro_batches: list[dict[str, Tensor]], before_update: Callable[[], None] | None = None
) -> float:
    """Train one optimizer step as the trainer does, and return its mean loss over the step's tokens."""
    tokens = sum(count_targets(batch["labels"]) for batch in micro_batches)
    engine.train(True)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch in micro_batches:
        loss = token_loss_sum(engine.forward(batch), batch["labels"])
        total += loss.detach()
        engine.backward(loss / tokens)
        del loss
    if before_update:
        before_update()
    engine.step()
    return float(total) / tokens


def time_steps(engine: Engine, micro_batches: list[dict[str, Tensor]], number: int) -> tuple[list[float], float]:
    """Train ``number`` steps, and return the seconds of each and the last loss."""
    seconds, loss = [], float("nan")
    for _ in range(number):
        synchronize(engine.device)
        began = time.perf_counter()
        loss = train_step(engine, micro_batches)
        synchronize(engine.device)
        seconds.append(time.perf_counter() - began)
    return seconds, loss


def summary(seconds: list[float]) -> dict[str, float]:
    """Return the median of the steps' seconds, and their extremes."""
    return {"median": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds)}


def settings_that_differ(config: Config) -> dict[str, Any]:
    """Return the settings that differ from the gpu profile's, to report beside the figures."""
    usual = Config.create("gpu").flat()
    private = ("storage", "model", "dataset", "name")
    return {k: v for k, v in config.flat().items() if v != usual[k] and k not in private}
