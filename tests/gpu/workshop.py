"""Step 3: the workshop's models on one GPU, with plain torch, then with ZeRO by stage, offload and pinned memory.

Weights are random, because only the dimensions matter here. Unless its name says otherwise, a case trains 16 full
sequences per step in four micro-batches, in bf16. The predictions of :mod:`tutorial_lib.theory` are next to the
measurements.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from tests.gpu.cases import Cases, Setting
from tests.gpu.training import (
    dense_peak,
    device_of,
    engine_of,
    full_rows,
    matmul_peak,
    settings_that_differ,
    summary,
    time_steps,
    train_step,
    write_model,
)
from tutorial_lib.config import Config
from tutorial_lib.engine import Engine
from tutorial_lib.engine.predictions import predict_step_seconds, states_and_peak, workload_and_layout
from tutorial_lib.measure.memory import StateBytes, peak_memory, reset_peak_memory
from tutorial_lib.models import load_config, load_model
from tutorial_lib.models.dimensions import from_config
from tutorial_lib.theory import peak_memory as predicted_peak
from tutorial_lib.theory.dimensions import Dimensions
from tutorial_lib.theory.flops import flops_per_token

TINY_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
BLOOM_560M = {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250_880, "initializer_range": 0.02}


@dataclass(frozen=True)
class Model:
    """A model directory with the sequence length that it is trained at."""

    path: str
    seq_length: int
    has_weights: bool = False

    @property
    def dimensions(self) -> Dimensions:
        return from_config(load_config(self.path))


def models(setting: Setting) -> dict[str, Callable[[], Model]]:
    """Return the functions that build the workshop's models, by the model's name."""
    bloom = TINY_BLOOM if setting.tiny else BLOOM_560M
    found = {"bloom-560m": lambda: Model(write_weights(setting, "bloom-560m", **bloom), _length(512), True)}
    found["gpt2"] = lambda: Model("embedded/gpt2" if setting.tiny else "embedded/gpt2-small", _length(1024))

    def _length(full: int) -> int:
        return 16 if setting.tiny else full

    return found


def write_weights(setting: Setting, name: str, **dimensions: Any) -> str:
    """Write a BLOOM model with random weights unless it exists, because reading weights is faster than drawing them."""
    path = setting.path(f"models/{name}")
    if not (path / "model.safetensors").exists():
        write_model(setting, name, "embedded/bloom", **dimensions)
        load_model(str(path), random_init=True).save_pretrained(path)
    return str(path)


def ways(setting: Setting) -> dict[str, dict[str, Any]]:
    """Return the engine settings to compare."""
    found: dict[str, dict[str, Any]] = {"plain torch": {"engine": "torch"}}
    for stage in (0, 1, 2, 3):
        found[f"ZeRO-{stage}"] = {"zero_stage": stage}
    for engine in ("plain torch", "ZeRO-0"):
        found[f"{engine}, micro-batches of 16"] = {**found[engine], "micro_batch": 16}
        found[f"{engine}, 4 micro-batches of 16"] = {**found[engine], "micro_batch": 16, "global_batch": 64}
    found["ZeRO-0, 4 micro-batches of 16, loss in 8 chunks"] = {
        "zero_stage": 0, "micro_batch": 16, "global_batch": 64, "loss_chunks": 8
    }  # fmt: skip
    for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")):
        for pinned in (False, True):
            name = f"ZeRO-{stage}, offload {offload}{', pinned' if pinned else ''}"
            found[name] = {"zero_stage": stage, "offload": offload, "pin_memory": pinned}
    fewer = ["plain torch", "ZeRO-1", "ZeRO-3", "ZeRO-2, offload optimizer, pinned", "ZeRO-3, offload all, pinned"]
    return setting.pick(
        full=found,
        quick={name: found[name] for name in fewer},
        tiny={name: found[name] for name in fewer[:3] + fewer[4:]},
    )


def cases(setting: Setting) -> Cases:
    """Return this module's measurements."""
    found: Cases = {}
    chosen = models(setting)
    if setting.tiny:
        del chosen["gpt2"]
    for way, flat in ways(setting).items():
        for model, make in chosen.items():
            if model == "gpt2" and "offload" in flat and setting.size == "full":
                continue  # bloom-560m shows offload
            found[f"{model}: {way}"] = partial(measure, setting, make, flat)
    return found


def configure(setting: Setting, model: Model, **flat: Any) -> Config:
    """Return the configuration of a case."""
    return Config.create(
        "gpu",
        **{
            "device": setting.device, "launcher": "none", "storage": setting.scratch, "model": model.path,
            "random_init": not model.has_weights, "seq_length": model.seq_length, "micro_batch": 4, "global_batch": 16,
            "learning_rate": 1e-4, "pin_memory": False, **flat,
        },
    )  # fmt: skip


def measure(setting: Setting, make: Callable[[], Model], flat: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps, and return speed and memory, measured and predicted."""
    model = make()
    config = configure(setting, model, **flat)
    if setting.tiny:
        buckets = {"bucket_size": 100_000} if config.engine.name == "deepspeed" and config.engine.zero_stage else {}
        config = config.override(micro_batch=2, global_batch=4, **buckets)
    dimensions, device = model.dimensions, device_of(setting)
    offloaded = config.engine.offload != "none"
    warm, timed = 2, setting.pick(full=3 if offloaded else 6, quick=2 if offloaded else 4, tiny=2)
    reset_peak_memory(device)
    with engine_of(config, setting) as engine:
        batches = full_rows(dimensions.vocabulary, config, device)
        for _ in range(warm):
            train_step(engine, batches)
        peak, held = peak_memory(device), allocated(device)
        states, phases = account_of_a_step(engine, batches)
        reset_peak_memory(device)
        seconds, loss = time_steps(engine, batches, timed)
        step_peak, params = peak_memory(device), engine.num_parameters
    steps = summary(seconds)
    tokens = config.run.global_batch * config.data.seq_length
    return {
        "settings": settings_that_differ(config),
        "num_params": params,
        "step_seconds": steps,
        "samples_per_second": config.run.global_batch / steps["median"],
        "tokens_per_second": tokens / steps["median"],
        **utilisations(setting, dimensions, params, config.data.seq_length, tokens / steps["median"]),
        "states_bytes": states,
        "allocator_peak_bytes": max(peak, step_peak),
        "held_between_steps_bytes": held,
        "step_peak_bytes": None if held is None else step_peak - held,
        "phase_peak_bytes": phases,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if setting.device == "cuda" else None,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "predicted": predict(config, dimensions, params),
        "last_loss": loss,
    }


def account_of_a_step(engine: Engine, batches: list[dict[str, torch.Tensor]]) -> tuple[dict[str, Any], dict[str, int]]:
    """Train a step, and return its states just before the update, and its peaks before and during the update."""
    states: dict[str, Any] = {}
    peaks: dict[str, int] = {}

    def before_update() -> None:
        peaks["loss and backward"] = peak_memory(engine.device)
        states.update(StateBytes.of(engine.state_tensors()).to_dict())
        reset_peak_memory(engine.device)

    reset_peak_memory(engine.device)
    train_step(engine, batches, before_update)
    peaks["update"] = peak_memory(engine.device)
    return states, peaks


def allocated(device: torch.device) -> int | None:
    """Return the bytes that PyTorch's allocator has in use, or None on a CPU, where PyTorch does not count them."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None


def utilisations(
    setting: Setting, dimensions: Dimensions, params: int, seq_length: int, tokens_per_second: float
) -> dict[str, float | None]:
    """Return MFU relative to the data sheet's peak, and relative to a matrix product that this process measures."""
    measured = measured_peak(setting)
    per_token = flops_per_token(params, dimensions.layers, dimensions.hidden, seq_length)
    nominal = dense_peak(device_of(setting))
    return {
        "mfu": tokens_per_second * per_token / nominal if nominal else None,
        "mfu_of_measured_peak": tokens_per_second * per_token / measured,
        "measured_peak_flops": measured,
    }


@cache
def measured_peak(setting: Setting) -> float:
    """Return the FLOP/s of a bf16 matrix product, measured when this process first asks."""
    size, seconds = setting.pick(full=(8192, 0.5), quick=(8192, 0.3), tiny=(128, 0.01))
    return matmul_peak(size, torch.bfloat16, device_of(setting), seconds)


def predict(config: Config, dimensions: Dimensions, params: int) -> dict[str, float | None]:
    """Return a case's predictions: bytes of states and activations, the peak, the bytes that a step adds, and seconds.

    For a device without a preset, the time is None.
    """
    workload, layout = workload_and_layout(config, dimensions, params)
    part = predicted_peak.part_of_model(dimensions, params)
    states, step_peak = states_and_peak(workload, layout, config.accumulation)
    most = predicted_peak.peak_memory(workload, layout, part, states, config.accumulation)
    device = torch.cuda.get_device_name() if config.run.device == "cuda" else "cpu"
    return {
        "states_bytes": states.device,
        "host_states_bytes": states.host,
        "activations_bytes": most.activations,
        "memory_bytes": most.total,
        "step_peak_bytes": step_peak,
        "step_seconds": predict_step_seconds(config, [{"device": device, "ranks_on_node": 1}]),
        **{
            f"{each.phase}_bytes": each.total
            for each in predicted_peak.phase_peaks(workload, layout, part, states, config.accumulation)
        },
    }
