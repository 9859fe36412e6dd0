"""Step 5: Chrome traces of single steps, kernel by kernel, gzipped in one archive.

GPT-2 small runs with ZeRO-1 and ZeRO-3. bloom-560m runs at stage 0 with small and with large micro-batches, to show for
how much of a step the GPU is busy, and with which kernels.

Open a trace at https://ui.perfetto.dev or in chrome://tracing.
"""

from __future__ import annotations

import gzip
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.gpu.cases import Cases, Setting
from tests.gpu.training import engine_of, full_rows, synchronize, time_steps, train_step
from tests.gpu.workshop import configure, models

LARGEST_BYTES = 6 * 2**20
"""Largest gzipped trace in bytes, small enough to commit."""


def cases(setting: Setting) -> Cases:
    """Return this module's measurements."""
    found: Cases = {
        f"ZeRO-{stage}": partial(trace, setting, "gpt2", f"zero{stage}", zero_stage=stage) for stage in (1, 3)
    }
    for size in () if setting.tiny else (4, 16):
        file, flat = f"bloom-zero0-{size}", {"zero_stage": 0, "micro_batch": size, "global_batch": 16}
        found[f"bloom-560m, ZeRO-0, micro-batches of {size}"] = partial(trace, setting, "bloom-560m", file, **flat)
    return found


def trace(setting: Setting, name: str, file: str, **flat: Any) -> dict[str, Any]:
    """Profile one step after three warm-up steps, keep the trace, and return the step's times by kernel."""
    model = models(setting)[name]()
    sizes = {"micro_batch": 2, "global_batch": 2, "bucket_size": 100_000} if setting.tiny else {"global_batch": 8}
    config = configure(setting, model, **{**sizes, **flat})
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (setting.device == "cuda")
    with engine_of(config, setting) as engine:
        batches = full_rows(model.dimensions.vocabulary, config, engine.device)
        seconds, _ = time_steps(engine, batches, 3)
        with profile(activities=activities, acc_events=True) as profiler:
            train_step(engine, batches)
            synchronize(engine.device)
    plain = setting.path(f"{file}.json")
    profiler.export_chrome_trace(str(plain))
    packed = gzip.compress(plain.read_bytes(), compresslevel=6)
    kept = len(packed) <= LARGEST_BYTES
    if kept:
        with zipfile.ZipFile(Path(setting.out) / "traces.zip", "a") as archive:
            archive.writestr(f"{file}.json.gz", packed)
    plain.unlink()
    return {
        "trace": f"{file}.json.gz in traces.zip" if kept else "too large to keep",
        "trace_bytes": len(packed),
        "step_seconds_without_profiler": min(seconds),
        **_times(profiler, setting),
    }


def _times(profiler: Any, setting: Setting) -> dict[str, Any]:
    key = "self_device_time_total" if setting.device == "cuda" else "self_cpu_time_total"
    entries = profiler.key_averages()
    if setting.device == "cuda":  # not operators, whose times repeat those of their kernels
        entries = [e for e in entries if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    longest = sorted(entries, key=lambda e: -getattr(e, key))
    return {
        "busy_seconds": sum(getattr(e, key) for e in entries) / 1e6,
        "kernel_calls": sum(e.count for e in entries),
        "longest": [{"name": e.key[:120], "calls": e.count, "seconds": getattr(e, key) / 1e6} for e in longest[:12]],
    }
