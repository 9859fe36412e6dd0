"""What this machine can run: its cores, memory, GPUs, compiler and packages, and whether each profile will work.

Nothing heavy is imported to find out, so the answer takes well under a second: package versions come from their
metadata, GPUs from the driver, and torch is asked only where the driver reports a GPU. The demands of a profile are
read from :class:`tutorial_lib.config.Config`, not repeated here.
"""

from __future__ import annotations

import ast
import dataclasses
import json as json_module
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from tutorial_lib.config import PROFILES, Config

PACKAGES = ("torch", "deepspeed", "ray", "transformers", "datasets", "accelerate", "torchdata", "jupyterlab")
OPERATORS = ("deepspeed_shm_comm", "cpu_adam")
"""What DeepSpeed needs compiled on a CPU: the first by every start, the second by offload of the optimizer."""

MEMORY_PER_WORKER_GB = 1.0
"""A worker process with torch, DeepSpeed, Ray and a tiny model takes about 0.7 GB; this leaves room."""

MEMORY_TO_START_GB = 0.45
"""What a worker process takes before it has a model: its imports."""

MEMORY_BESIDES_GB = 2.0
"""The notebook or shell that starts the run, and Ray's own processes."""

SHM_FOR_RAY_GB = 0.5
STALE_LOCK_SECONDS = 600
GB = 1e9


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver and torch see it; what only torch knows is ``None`` where torch cannot use it."""

    name: str
    memory_gb: float
    compute_capability: str | None
    bf16: bool | None


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package. ``expected`` is the version in constraints.txt, where the checkout is at hand."""

    version: str | None
    expected: str | None

    @property
    def as_expected(self) -> bool:
        return self.version is not None and self.expected in (None, self.version.split("+")[0])


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a profile will work here. Each problem and each note says what to do about it."""

    works: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What :func:`diagnose` found. Sizes are in GB (10^9 bytes)."""

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
        """A table for people: the machine, the packages, then a verdict on each profile."""
        return "\n".join(_table(self))


def main(json: bool = False) -> int:
    """Print the report as a table or as JSON. Returns 0 if at least one profile will work, else 1."""
    report = diagnose()
    print(report.to_json() if json else report.to_text())
    return 0 if any(verdict.works for verdict in report.profiles.values()) else 1


def diagnose() -> Report:
    """Look at this machine. Starts no process group, opens no connection but to itself."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = _within_cgroup(memory.total, memory.available)
    gpus, gpu_problem = _gpus()
    shm = Path("/dev/shm")
    findings: dict[str, Any] = dict(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=usable_cores(),
        memory_gb=total / GB,
        memory_available_gb=available / GB,
        shm_gb=shutil.disk_usage(shm).free / GB if shm.is_dir() else None,
        disk_free_gb=shutil.disk_usage(Path.cwd()).free / GB,
        gpus=gpus,
        gpu_problem=gpu_problem,
        compiler=_compiler(),
        ninja=shutil.which("ninja", path=_search_path()) is not None,
        operators=_operators(),
        loopback_problem=_loopback_problem(),
        ports={port: _port_state(port) for port in (29500, 8888)},
        scheduler=_scheduler(),
        packages=_packages(),
    )
    machine = Report(**findings, profiles={})
    return dataclasses.replace(machine, profiles={name: judge(machine, Config.create(name)) for name in PROFILES})


def judge(machine: Report, config: Config) -> Verdict:
    """Whether ``config`` can run on ``machine``; ``machine.profiles`` is not looked at."""
    problems = list(_everywhere(machine))
    notes: list[str] = []
    if config.run.device == "cuda":
        gpu_problems = list(_gpu_problems(machine, config))
        if gpu_problems and config.run.launcher == "none" and machine.scheduler:
            notes.append(
                f"{machine.scheduler} can start jobs on nodes with GPUs; this node need not have any. "
                "Look at one of those: srun --gpus 1 python -m tutorial_lib doctor"
            )
        else:
            problems += gpu_problems
    else:
        problems += _cpu_problems(machine, config)
    if config.run.launcher == "none" and not machine.scheduler:
        notes.append(
            "no scheduler and no torchrun here: start it with "
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


def _everywhere(machine: Report) -> Iterator[str]:
    absent = [name for name, package in machine.packages.items() if package.version is None]
    if absent:
        yield f"not installed: {', '.join(absent)}. Run make setup, or pip install -e '.[dev]' -c constraints.txt"
    if not machine.python.startswith(("3.11.", "3.12.", "3.13.")):
        yield f"Python is {machine.python}; the pinned packages are for 3.11 to 3.13. Run make setup PYTHON=python3.13"
    if machine.loopback_problem:
        yield f"processes cannot talk over 127.0.0.1 ({machine.loopback_problem}). Bring the loopback interface up"


def _cpu_problems(machine: Report, config: Config) -> Iterator[str]:
    workers = config.parallel.world_size
    uncompiled = [name for name, state in machine.operators.items() if state == "not compiled"]
    if uncompiled and not (machine.compiler and machine.ninja):
        yield (
            f"DeepSpeed has to compile {' and '.join(uncompiled)}, but there is no C++ compiler with ninja. "
            "Install g++ (Debian: sudo apt-get install g++) and run make setup"
        )
    if machine.memory_available_gb < (needed := workers * MEMORY_PER_WORKER_GB + MEMORY_BESIDES_GB):
        yield (
            f"{machine.memory_available_gb:.1f} GB of memory are free, and {workers} workers need about {needed:.0f}. "
            "Close other programs, or raise the container's limit"
        )


def _gpu_problems(machine: Report, config: Config) -> Iterator[str]:
    if machine.gpu_problem:
        yield machine.gpu_problem
        return
    # A launcher of our own starts all ranks here; --launcher none joins ranks that may be spread over nodes.
    needed = config.parallel.world_size if config.run.launcher != "none" else 1
    if len(machine.gpus) < needed:
        yield f"{len(machine.gpus)} GPUs here, {needed} wanted. Write --dp {len(machine.gpus)}"
    without = [gpu.name for gpu in machine.gpus if gpu.bf16 is False]
    if config.engine.precision == "bf16" and without:
        yield f"{without[0]} has no bf16 arithmetic of its own. Write --precision fp16 or fp32"


def _operator_notes(machine: Report) -> Iterator[str]:
    for name, state in machine.operators.items():
        if state.startswith("locked"):
            yield f"{name}: {state}; if no build is running, a run will wait for ever. Remove that file"
        elif state == "not compiled":
            yield f"DeepSpeed compiles {name} at its first use (about a minute). make setup does it beforehand"


# --- what there is ----------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the share a container was given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def available_memory_gb() -> float:
    """Memory that new processes could take without the kernel having to end one."""
    import psutil

    memory = psutil.virtual_memory()
    return _within_cgroup(memory.total, memory.available)[1] / GB


def _within_cgroup(total: int, available: int) -> tuple[int, int]:
    limit, used = _read_cgroup("memory.max"), _read_cgroup("memory.current")
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        available = min(available, total - int(used or 0))
    return total, available


def _read_cgroup(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """The GPUs, and what stands against using them: ``None`` if nothing does."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no module, no library, no driver: all the same to the reader
        return (), "no NVIDIA driver answers here. Use --profile cpu, or a machine with a GPU"
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    seen = [(pynvml.nvmlDeviceGetName(h), pynvml.nvmlDeviceGetMemoryInfo(h).total / GB) for h in handles]
    pynvml.nvmlShutdown()
    if not seen:
        return (), "the NVIDIA driver reports no GPU. Use --profile cpu, or a machine with a GPU"
    by_driver = tuple(Gpu(name, memory, None, None) for name, memory in seen)
    try:
        import torch
    except ImportError:
        return by_driver, "torch cannot be imported. Run make setup"
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return by_driver, (
                f"torch {torch.__version__} is the build without CUDA. Install the one with: "
                f"pip install --force-reinstall torch=={torch.__version__.split('+')[0]} from an index that has it"
            )
        return by_driver, (
            f"torch is built for CUDA {torch.version.cuda} and cannot use this driver or these devices. "
            "Update the driver, or look at CUDA_VISIBLE_DEVICES"
        )
    # Emulated bf16 is slow and hides that the GPU has none.
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(d.name, d.total_memory / GB, f"{d.major}.{d.minor}", bf16) for d in devices), None


def _search_path() -> str:
    """PATH with this interpreter's own scripts first, as they are when its environment is activated."""
    return os.pathsep.join((str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)))


def _compiler() -> str | None:
    path = shutil.which(os.environ.get("CXX", "g++").split()[0])
    if path is None:
        return None
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0]


def _operators() -> dict[str, str]:
    """State of each operator: ``compiled``, ``not compiled``, or ``locked`` by a build that did not end."""
    compiled = _operators_in_the_package()
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    states = {}
    for name in OPERATORS:
        state = "compiled" if compiled.get(name) or any(cache.glob(f"**/{name}/{name}.so")) else "not compiled"
        locks = [] if compiled.get(name) else list(cache.glob(f"**/{name}/lock"))
        if locks and time.time() - locks[0].stat().st_mtime > STALE_LOCK_SECONDS:
            state = f"locked by {locks[0]}"
        states[name] = state
    return states


def _operators_in_the_package() -> dict[str, Any]:
    # What DeepSpeed's set-up wrote down; read, not imported, because importing DeepSpeed imports torch.
    found = util.find_spec("deepspeed")
    record = Path(found.origin).with_name("git_version_info_installed.py") if found and found.origin else None
    if record is None or not record.is_file():
        return {}
    for line in record.read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "installed_ops":
            return dict(ast.literal_eval(value))
    return {}


def _loopback_problem() -> str | None:
    """Why two processes could not talk over a free port of 127.0.0.1, or ``None`` if they can."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname(), timeout=2):
                return None
    except OSError as error:
        return str(error)


def _port_state(port: int) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return "in use"
    return "free"


def _scheduler() -> str | None:
    """Who would start the ranks of a ``--launcher none`` run from here."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return "torchrun"
    if "SLURM_JOB_ID" in os.environ or shutil.which("sbatch"):
        return "SLURM"
    return None


def _packages() -> dict[str, Package]:
    constraints = Path(__file__).parents[1] / "constraints.txt"
    lines = constraints.read_text().splitlines() if constraints.is_file() else []
    expected = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    found = {}
    for name in PACKAGES:
        try:
            version: str | None = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        found[name] = Package(version, expected.get(name))
    return found


# --- the table --------------------------------------------------------------------------------------------------------


def _table(report: Report) -> Iterator[str]:
    yield from _aligned(
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
    yield from _aligned({name: _package_text(package) for name, package in report.packages.items()})
    for name, verdict in report.profiles.items():
        yield ""
        yield f"profile {name}: {'will work' if verdict.works else 'will not work'}"
        yield from (f"  - {line}." for line in verdict.problems or verdict.notes)


def _aligned(rows: dict[str, str]) -> Iterator[str]:
    width = max(map(len, rows)) + 2
    yield from (f"{label:<{width}}{value}" for label, value in rows.items())


def _gpu_text(gpu: Gpu) -> str:
    known = f", compute {gpu.compute_capability}, bf16 {'yes' if gpu.bf16 else 'no'}" if gpu.compute_capability else ""
    return f"{gpu.name} ({gpu.memory_gb:.0f} GB{known})"


def _package_text(package: Package) -> str:
    if package.version is None:
        return "not installed"
    return package.version if package.as_expected else f"{package.version} (tested with {package.expected})"
