"""What the processes of a step share: ``python -m tests.gpu.cases MODULE EVENTS FIRST SETTING`` runs a page's cases.

A page has a function ``cases(setting)`` that returns names and functions. Each function does one measurement and
returns what JSON can hold; a name with a unit ends in it (``peak_bytes``, ``step_seconds``). One that raises is
recorded as failed, with the error, and the next one runs.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tutorial_lib.config import Config
from tutorial_lib.launch.joined import process_group
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer import Engine, build_engine, count_tokens, token_loss_sum

Cases = dict[str, Callable[[], dict[str, Any]]]
DENSE_BF16_PEAK = {"H100": 989e12, "H200": 989e12}
"""FLOP/s without sparsity of the SXM modules, from NVIDIA's data sheets."""


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Args:
        device: ``cuda`` or ``cpu``.
        size: ``full``, ``quick`` (a look in about two minutes) or ``tiny`` (a rehearsal on a CPU).
        scratch: directory for runs, models and data; all steps share it.
        out: directory for results.
    """

    device: str
    size: str
    scratch: str
    out: str

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    def path(self, name: str) -> Path:
        return Path(self.scratch) / name

    def pick(self, **by_size: Any) -> Any:
        """Return the value for this size: ``full``, ``quick`` or ``tiny``."""
        return by_size[self.size]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device, 0) if self.device == "cuda" else torch.device("cpu")


def main(module: str, events_file: str, first: str, setting_json: str) -> None:
    """Run the cases of a page from number ``first`` on."""
    if sys.platform == "linux":
        from torch.multiprocessing import _prctl_pr_set_pdeathsig

        _prctl_pr_set_pdeathsig(9)  # a driver that is killed takes its step with it
    setting = Setting(**json.loads(setting_json))
    cases = importlib.import_module(module).cases(setting)
    with _HELD, open(events_file, "a", encoding="utf-8", buffering=1) as events:

        def tell(event: str, **content: Any) -> None:
            events.write(json.dumps({"event": event, "time": time.time(), **content}) + "\n")

        tell("plan", cases=list(cases))
        for number, (name, measure) in enumerate(cases.items()):
            if number < int(first):
                continue
            print(f"=== {name}", flush=True)
            tell("start", number=number)
            try:
                outcome: dict[str, Any] = {"result": measure()}
            except Exception as error:
                traceback.print_exc()
                last = traceback.format_exception(error)[-12:]
                outcome = {"error": {"type": type(error).__name__, "message": str(error), "traceback": "".join(last)}}
                del error
            clear_memory(setting)
            tell("end", number=number, **outcome)


def clear_memory(setting: Setting) -> None:
    """Give back what a case has left in the allocator's cache, so that the next one starts from nothing."""
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dense_peak(device: torch.device) -> float | None:
    """Return the data sheet's bf16 FLOP/s of this GPU, None for one that is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for model, peak in DENSE_BF16_PEAK.items() if model in name), None)


# ------------------------------------------------------------------------------------------------ models and rows


def write_model(setting: Setting, name: str, like: str, **dimensions: Any) -> str:
    """Write a model directory without weights, and return its path: a family's tokenizer with other dimensions.

    Args:
        setting: whose scratch directory to use.
        name: of the directory.
        like: an embedded model of the family.
        dimensions: entries of its ``config.json`` to replace.
    """
    from tutorial_lib.embedded import model_directory

    source, target = model_directory(like), setting.path(f"models/{name}")
    target.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (target / file).write_text((source / file).read_text())
    (target / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | dimensions))
    return str(target)


def full_rows(vocabulary: int, config: Config, device: torch.device) -> list[dict[str, Tensor]]:
    """Return an optimizer step's micro-batches of random tokens: every row is ``seq_length`` long, without padding."""
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (config.micro_batch, config.data.seq_length)
    ids = [torch.randint(vocabulary, shape, generator=generator).to(device) for _ in range(config.accumulation)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in ids]


# ------------------------------------------------------------------------------------------------ training


_HELD = ExitStack()
"""What lives as long as this process: its process group."""


def join_group(config: Config) -> Topology:
    """Be the only rank of a process group, as a run with ``launcher='none'`` is; one group serves all cases."""
    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        directory = _HELD.enter_context(tempfile.TemporaryDirectory())
        _HELD.enter_context(process_group(config, f"file://{directory}/rendezvous"))
    return Topology.create(config.parallel, rank=0, world_size=1)


@contextmanager
def engine_of(config: Config, setting: Setting) -> Iterator[Engine]:
    """Build the engine that a configuration names, and release it at the end."""
    engine = build_engine(config, join_group(config), setting.torch_device)
    try:
        yield engine
    finally:
        engine.close()


def train_step(
    engine: Engine, micro_batches: list[dict[str, Tensor]], before_update: Callable[[], None] | None = None
) -> float:
    """Train one optimizer step as the trainer does, and return its loss: the mean over the step's tokens."""
    tokens = sum(count_tokens(batch["labels"]) for batch in micro_batches)
    engine.train(True)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch in micro_batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        loss = token_loss_sum(engine.forward(inputs), batch["labels"])
        total += loss.detach()
        engine.backward(loss * (engine.averages_over / tokens))
        del loss
    if before_update:
        before_update()
    engine.step()
    return float(total) / tokens


def time_steps(engine: Engine, micro_batches: list[dict[str, Tensor]], number: int) -> tuple[list[float], float]:
    """Train ``number`` steps; return the seconds of each, and the last loss."""
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
    """Return a configuration's settings other than the gpu profile's, to read beside its figures."""
    usual = Config.create("gpu").flat()
    private = ("storage", "model", "dataset", "name")
    return {k: v for k, v in config.flat().items() if v != usual[k] and k not in private}


if __name__ == "__main__":
    main(*sys.argv[1:])
