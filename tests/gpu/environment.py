"""Step 1: facts about the machine, and measured limits of its matrix products, memory, disk and link to the host."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from tests.gpu import packages
from tests.gpu.cases import Cases, Setting
from tests.gpu.processes import ROOT
from tests.gpu.training import dense_peak, device_of, matmul_peak, synchronize
from tutorial_lib.doctor.machine import usable_cores


def cases(setting: Setting) -> Cases:
    """Return this module's measurements."""
    return {
        "machine": lambda: describe_machine(setting),
        "matrix product": lambda: measure_products(setting),
        "bandwidth": lambda: measure_bandwidth(setting),
        "disk": lambda: measure_disk(setting),
        "DeepSpeed's operators": lambda: compile_operators(setting),
        "doctor": ask_doctor,
    }


def describe_machine(setting: Setting) -> dict[str, Any]:
    """Return names, sizes and versions."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": usable_cores(),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": shutil.disk_usage(setting.scratch).free,
        "versions": packages.versions(setting.path("site")),
        "package_origins": json.loads(setting.path("origins.json").read_text()),
        "torch_cuda": torch.version.cuda,
        "nvcc": _first_line("nvcc --version | tail -2"),
        "compiler": _first_line("g++ --version"),
        "processor": _first_line("grep -m1 'model name' /proc/cpuinfo"),
        "cpu_flags_avx512": bool(_first_line("grep -m1 avx512f /proc/cpuinfo")),
        "gpu": None,
    }
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _first_line("nvidia-smi --query-gpu=driver_version --format=csv,noheader"),
            "power_limit": _first_line("nvidia-smi --query-gpu=power.limit --format=csv,noheader"),
            "link": _first_line("nvidia-smi --query-gpu=pcie.link.gen.max,pcie.link.width.max --format=csv,noheader"),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "dense_bf16_peak_flops": dense_peak(device_of(setting)),
        }
    return found


def _first_line(command: str) -> str | None:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=20)
    return done.stdout.strip().partition("\n")[0] or None


def measure_products(setting: Setting) -> dict[str, Any]:
    """Return the FLOP/s of square matrix products by number format, and the best bf16 one."""
    sizes = setting.pick(full=(4096, 8192, 16384), quick=(8192,), tiny=(128,))
    seconds = setting.pick(full=1.0, quick=0.5, tiny=0.01)
    formats = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    flops = {
        f"{name} {size}": matmul_peak(size, dtype, device_of(setting), seconds)
        for name, dtype in formats.items()
        for size in (sizes if name == "bf16" else sizes[:1])
    }
    return {
        "product_flops": flops,
        "bf16_peak_flops": max(value for name, value in flops.items() if name.startswith("bf16")),
        "dense_bf16_peak_flops": dense_peak(device_of(setting)),
    }


def measure_bandwidth(setting: Setting) -> dict[str, Any]:
    """Return bytes per second within the device (read plus written), and to and from pinned and pageable memory."""
    device, on_gpu = device_of(setting), setting.device == "cuda"
    size = setting.pick(full=2**30, quick=2**29, tiny=2**20)
    here, there = (torch.randint(0, 255, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    pageable = torch.randint(0, 255, (size,), dtype=torch.uint8)
    pinned = pageable.pin_memory() if on_gpu else pageable.clone()

    def rate(copy: Callable[[], Any], moved: int) -> float:
        seconds = []
        for _ in range(8):
            synchronize(device)
            began = time.perf_counter()
            copy()
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        return moved / statistics.median(seconds[2:])

    return {
        "copied_bytes": size,
        "device_to_device_bytes_per_second": rate(lambda: there.copy_(here), 2 * size),
        "pinned_to_device_bytes_per_second": rate(lambda: here.copy_(pinned, non_blocking=True), size),
        "device_to_pinned_bytes_per_second": rate(lambda: pinned.copy_(here, non_blocking=True), size),
        "pageable_to_device_bytes_per_second": rate(lambda: here.copy_(pageable), size),
        "device_to_pageable_bytes_per_second": rate(lambda: pageable.copy_(here), size),
    }


def measure_disk(setting: Setting) -> dict[str, Any]:
    """Return the bytes per second of writing a file until it is on the disk, which is the limit for checkpoints."""
    size = setting.pick(full=2**30, quick=2**28, tiny=2**20)
    block, path = os.urandom(min(size, 2**24)), setting.path("disk-test")
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return {"written_bytes": size, "write_and_sync_bytes_per_second": size / seconds}


def compile_operators(setting: Setting) -> dict[str, Any]:
    """Compile DeepSpeed's CPU Adam, which offload needs, and report whether FusedAdam could be compiled.

    FusedAdam is not compiled, because the engine updates with ``torch.optim.AdamW`` if nothing is offloaded.
    """
    os.environ["DS_ACCELERATOR"] = setting.device
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    began = time.perf_counter()
    error = None
    try:
        CPUAdamBuilder().load(verbose=False)
    except (Exception, SystemExit) as failure:
        error = f"{type(failure).__name__}: {failure}"[:4000]
    seconds, compatible = time.perf_counter() - began, None
    with suppress(Exception):
        compatible = bool(FusedAdamBuilder().is_compatible(verbose=False))
    return {
        "cpu_adam": "compiled" if error is None else "could not be compiled: offload cannot be measured",
        "cpu_adam_error": error,
        "cpu_adam_seconds": seconds,
        "fused_adam": "left out: the engine uses torch.optim.AdamW",
        "fused_adam_could_be_compiled": compatible,
    }


def ask_doctor() -> dict[str, Any]:
    """Return the exit code and output of ``python -m tutorial_lib doctor`` on this machine."""
    done = subprocess.run(
        [sys.executable, "-m", "tutorial_lib", "doctor"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    return {"exit_code": done.returncode, "said": done.stdout.splitlines(), "errors": done.stderr[-2000:]}
