"""Verdict of the doctor: whether each profile will work on a machine, and what to do if not.

A profile's requirements come from :class:`tutorial_lib.config.Config`; they are not repeated here.
"""

from __future__ import annotations

import dataclasses
import json as json_module
from collections.abc import Iterator
from dataclasses import dataclass

from tutorial_lib.config import Config, ParallelConfig
from tutorial_lib.doctor.machine import Gpu, Package
from tutorial_lib.tables import align

MEMORY_PER_WORKER_GB = 1.0
"""Memory per worker. One with torch, DeepSpeed, Ray and a tiny model needs about 0.7 GB; the rest is headroom."""

MEMORY_OVERHEAD_GB = 2.0
"""Memory of the notebook or shell that starts the run, and of Ray's own processes."""

SHM_FOR_RAY_GB = 0.5


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verdict on a profile: whether it will work here. Each problem and each note says what to do about it."""

    works: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Findings of :func:`diagnose`. Sizes are in GB (10^9 bytes)."""

    system: str
    python: str
    cores: int
    memory_gb: float
    memory_available_gb: float
    shm_gb: float | None
    disk_free_gb: float
    gpus: tuple[Gpu, ...]
    gpu_problem: str | None
    compiler: str | None
    ninja: bool
    operators: dict[str, str]
    loopback_problem: str | None
    ports: dict[int, str]
    scheduler: str | None
    packages: dict[str, Package]
    profiles: dict[str, Verdict]

    def to_json(self) -> str:
        return json_module.dumps(dataclasses.asdict(self), indent=2)

    def to_text(self) -> str:
        """Format the report for people: the machine, the packages, then a verdict on each profile."""
        return "\n".join(_table(self))


def judge(machine: Report, config: Config) -> Verdict:
    """Judge whether ``config`` can run on ``machine``; ``machine.profiles`` is ignored."""
    problems = list(_common_problems(machine))
    notes: list[str] = []
    if config.run.device == "cuda":
        gpu_problems = list(_gpu_problems(machine, config))
        if gpu_problems and config.run.launcher == "none" and machine.scheduler:
            notes.append(
                f"{machine.scheduler} can start jobs on nodes with GPUs; this node does not need one. "
                "Check a node with a GPU: srun --gpus 1 python -m tutorial_lib doctor"
                + ("; write a job with python -m tutorial_lib slurm" if machine.scheduler == "SLURM" else "")
            )
        else:
            problems += gpu_problems
    else:
        problems += _cpu_problems(machine, config.parallel)
    if config.run.launcher == "none" and not machine.scheduler:
        notes.append(
            "neither a scheduler nor torchrun starts the ranks here. Start them with "
            f"python -m torch.distributed.run --nproc_per_node {max(1, len(machine.gpus))} -m tutorial_lib train "
            f"--profile cluster --dp {max(1, len(machine.gpus))}"
        )
    if machine.shm_gb is not None and machine.shm_gb < SHM_FOR_RAY_GB:
        notes.append(
            f"/dev/shm has {machine.shm_gb:.2f} GB free: Ray will keep shared objects on disk, which is slower. "
            "Start a container with --shm-size=1g"
        )
    notes += _operator_notes(machine)
    notes += [
        f"{name} is {package.version}, tested with {package.expected}: run make setup"
        for name, package in machine.packages.items()
        if package.version and not package.as_expected
    ]
    return Verdict(not problems, tuple(problems), tuple(notes) if not problems else ())


def _common_problems(machine: Report) -> Iterator[str]:
    absent = [name for name, package in machine.packages.items() if package.version is None]
    if absent:
        yield f"not installed: {', '.join(absent)}. Run make setup, or pip install -e '.[dev]' -c constraints.txt"
    if not machine.python.startswith(("3.11.", "3.12.", "3.13.")):
        yield f"Python is {machine.python}; the pinned packages are for 3.11 to 3.13. Run make setup PYTHON=python3.13"
    if machine.loopback_problem:
        yield f"processes cannot talk over 127.0.0.1 ({machine.loopback_problem}). Bring the loopback interface up"


def _cpu_problems(machine: Report, parallel: ParallelConfig) -> Iterator[str]:
    workers = parallel.world_size
    uncompiled = [name for name, state in machine.operators.items() if state == "not compiled"]
    if uncompiled and not (machine.compiler and machine.ninja):
        yield (
            f"DeepSpeed has to compile {' and '.join(uncompiled)}, but there is no C++ compiler with ninja. "
            "Install g++ (Debian: sudo apt-get install g++) and run make setup"
        )
    if machine.memory_available_gb < (needed := workers * MEMORY_PER_WORKER_GB + MEMORY_OVERHEAD_GB):
        yield (
            f"{machine.memory_available_gb:.1f} GB of memory is free, but {workers} workers need about {needed:.0f} GB"
            ". Close other programs, or raise the container's limit"
        )


def _gpu_problems(machine: Report, config: Config) -> Iterator[str]:
    if machine.gpu_problem:
        yield machine.gpu_problem
        return
    # Our own launchers start all ranks here; with --launcher none, the ranks may be spread over several nodes.
    needed = config.parallel.world_size if config.run.launcher != "none" else 1
    if len(machine.gpus) < needed:
        yield f"needs {needed} GPUs, but this machine has {len(machine.gpus)}. Write --dp {len(machine.gpus)}"
    without = [gpu.name for gpu in machine.gpus if gpu.bf16 is False]
    if config.engine.precision == "bf16" and without:
        yield f"{without[0]} has no native bf16. Write --precision fp16 or fp32"


def _operator_notes(machine: Report) -> Iterator[str]:
    for name, state in machine.operators.items():
        if state.startswith("locked"):
            yield f"{name}: {state}; if no build is running, a run will hang. Remove that file"
        elif state == "not compiled":
            yield f"DeepSpeed compiles {name} on first use (about a minute). make setup does it in advance"


def _table(report: Report) -> Iterator[str]:
    yield from _pairs(
        {
            "system": f"{report.system}, Python {report.python}",
            "cores": str(report.cores),
            "memory": f"{report.memory_gb:.1f} GB, {report.memory_available_gb:.1f} free",
            "/dev/shm": "none" if report.shm_gb is None else f"{report.shm_gb:.2f} GB free",
            "disk here": f"{report.disk_free_gb:.0f} GB free",
            "GPUs": "; ".join(map(_gpu_text, report.gpus)) or "none",
            "compiler": f"{report.compiler or 'none'}, {'with' if report.ninja else 'without'} ninja",
            "operators": ", ".join(f"{name} {state}" for name, state in report.operators.items()),
            "loopback": report.loopback_problem or "works",
            "ports": ", ".join(f"{port} {state}" for port, state in report.ports.items()),
            "scheduler": report.scheduler or "none",
        }
    )
    yield ""
    yield from _pairs({name: _package_text(package) for name, package in report.packages.items()})
    for name, verdict in report.profiles.items():
        yield ""
        yield f"profile {name}: {'will work' if verdict.works else 'will not work'}"
        yield from (f"  - {line}." for line in verdict.problems or verdict.notes)


def _pairs(rows: dict[str, str]) -> list[str]:
    return align(rows.items(), (False, False))


def _gpu_text(gpu: Gpu) -> str:
    known = f", compute {gpu.compute_capability}, bf16 {'yes' if gpu.bf16 else 'no'}" if gpu.compute_capability else ""
    memory = "memory unknown" if gpu.memory_gb is None else f"{gpu.memory_gb:.0f} GB"
    return f"{gpu.name} ({memory}{known})"


def _package_text(package: Package) -> str:
    if package.version is None:
        return "not installed"
    return package.version if package.as_expected else f"{package.version} (tested with {package.expected})"
