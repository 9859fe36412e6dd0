"""Facts about this machine: cores, memory, GPUs, compiler, packages.

This module imports nothing heavy: it takes package versions from their metadata and GPUs from the driver, and imports
torch only if the driver reports a GPU. Launchers also use this module, to find out how many processes fit.
"""

from __future__ import annotations

import ast
import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("torch", "deepspeed", "ray", "transformers", "datasets", "accelerate", "torchdata", "jupyterlab")
OPERATORS = ("deepspeed_shm_comm", "cpu_adam")
"""Operators that DeepSpeed compiles for a CPU: every start needs the first one, and optimizer offload the second."""

MEMORY_TO_START_GB = 0.45
"""Memory that a worker process needs for its imports, before it builds a model."""

CGROUP = Path("/sys/fs/cgroup")
"""Directory of the limits that apply to this process's container."""

STALE_LOCK_SECONDS = 600
GB = 1e9


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU according to the driver and torch; facts that only torch knows are ``None`` if torch cannot use it."""

    name: str
    memory_gb: float | None
    """None if the driver does not know it, for example because the GPU uses the CPU's memory."""
    compute_capability: str | None
    bf16: bool | None


@dataclass(frozen=True, slots=True)
class Package:
    """A package: its installed version, if any, and the one in constraints.txt, if this is a checkout of the course."""

    version: str | None
    expected: str | None

    @property
    def as_expected(self) -> bool:
        return self.version is not None and self.expected in (None, self.version.split("+")[0])


def usable_cores() -> int:
    """Return the number of cores that this process may use, given its affinity and the container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def available_memory_gb() -> float:
    """Return the memory that new processes can use before the kernel has to kill one, in GB."""
    import psutil

    memory = psutil.virtual_memory()
    return memory_within_cgroup(memory.total, memory.available)[1] / GB


def memory_within_cgroup(total: int, available: int) -> tuple[int, int]:
    """Lower both values to the container's limit. Page cache does not count as used, because it can be reclaimed."""
    limit, used = _read_cgroup("memory.max"), _read_cgroup("memory.current")
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        statistics = dict(line.split() for line in _read_cgroup("memory.stat").splitlines())
        cached = int(statistics.get("inactive_file", 0))
        available = min(available, total - max(0, int(used or 0) - cached))
    return total, available


def _read_cgroup(name: str) -> str:
    try:
        return (CGROUP / name).read_text().strip()
    except OSError:
        return ""


def find_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """Return the GPUs, and the reason why they cannot be used, or ``None`` if they can."""
    try:
        import pynvml

        pynvml.nvmlInit()
        number = pynvml.nvmlDeviceGetCount()
    except Exception:  # no module, no library or no driver: the advice is the same
        return (), "no NVIDIA driver answers here. Use --profile cpu, or a machine with a GPU"
    seen, failed = [], None
    for index in range(number):
        try:
            seen.append(_ask_driver(pynvml, index))
        except pynvml.NVMLError as error:
            failed = (
                f"GPU {index} does not answer the NVIDIA driver ({error}). Reset it or reboot, or leave it out with "
                "CUDA_VISIBLE_DEVICES"
            )
    pynvml.nvmlShutdown()
    by_driver = tuple(seen)
    if not by_driver:
        return (), failed or "the NVIDIA driver reports no GPU. Use --profile cpu, or a machine with a GPU"
    try:
        import torch
    except ImportError:
        return by_driver, "torch cannot be imported. Run make setup"
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return by_driver, (
                f"torch {torch.__version__} is a build without CUDA. Install one with CUDA: "
                f"pip install --force-reinstall torch=={torch.__version__.split('+')[0]} from an index that has it"
            )
        return by_driver, failed or (
            f"torch is built for CUDA {torch.version.cuda}, but cannot use this driver or these GPUs. "
            "Update the driver, or check CUDA_VISIBLE_DEVICES"
        )
    try:
        # Leave out emulated bf16: it is slow, and would hide that the GPU has no native bf16.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:  # a GPU has failed
        first_line, *_ = str(error).split("\n")
        return by_driver, failed or f"torch cannot use the GPUs: {first_line}"
    return tuple(Gpu(d.name, d.total_memory / GB, f"{d.major}.{d.minor}", bf16) for d in devices), None


def _ask_driver(pynvml: ModuleType, index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / GB
    except pynvml.NVMLError_NotSupported:
        memory = None
    return Gpu(pynvml.nvmlDeviceGetName(handle), memory, None, None)


def search_path() -> str:
    """Return PATH with this interpreter's own scripts first, as if its environment were activated."""
    return os.pathsep.join((str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)))


def find_compiler() -> str | None:
    named = os.environ.get("CXX", "").split() or ["g++"]
    path = shutil.which(named[0])
    if path is None:
        return None
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return (answer.stdout.splitlines() or [path])[0]


def operator_states() -> dict[str, str]:
    """Return the state of each operator: ``compiled``, ``not compiled``, or ``locked`` by an unfinished build."""
    compiled = prebuilt_operators()
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    states = {}
    for name in OPERATORS:
        state = "compiled" if compiled.get(name) or any(cache.glob(f"**/{name}/{name}.so")) else "not compiled"
        locks = [] if compiled.get(name) else list(cache.glob(f"**/{name}/lock"))
        if locks and _age(locks[0]) > STALE_LOCK_SECONDS:
            state = f"locked by {locks[0]}"
        states[name] = state
    return states


def _age(file: Path) -> float:
    """Return the seconds since a file was written, or 0 if it has just been removed."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def prebuilt_operators() -> dict[str, Any]:
    """Return whether each operator was compiled when DeepSpeed was installed, without importing DeepSpeed or torch."""
    found = util.find_spec("deepspeed")
    record = Path(found.origin).with_name("git_version_info_installed.py") if found and found.origin else None
    if record is None or not record.is_file():
        return {}
    for line in record.read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "installed_ops":
            return dict(ast.literal_eval(value))
    return {}


def loopback_problem() -> str | None:
    """Return why two processes cannot talk over a free port of 127.0.0.1, or ``None`` if they can."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname(), timeout=2):
                return None
    except OSError as error:
        return str(error)


def port_state(port: int) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return "in use"
    return "free"


def rendezvous_problem(endpoint: str) -> str | None:
    """Return why the processes of a run cannot meet at ``HOST:PORT``, as far as this machine can tell, or None.

    As with torchrun, an IPv6 address may stand in brackets. The name must resolve here. If the address belongs to this
    machine, the port must be free as well. This opens no connection, so other machines may check before the first
    process of the run listens there.
    """
    host, _, port = endpoint.rpartition(":")
    host = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    here = socket.gethostname()
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        return f"The rendezvous {endpoint!r} is not HOST:PORT with a port from 1 to 65535, such as node1:29500."
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host can have this name
        reason = error.strerror if isinstance(error, OSError) else error
        return (
            f"{here} cannot resolve the name {host!r} ({reason}), so its processes cannot meet the others at "
            f"{endpoint}. Every node must resolve it: `getent hosts {host}` has to print an address. Repair DNS or "
            "/etc/hosts there, or name the first node by its address."
        )
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:  # also on another machine's address, or without IPv6
            if error.errno == errno.EADDRINUSE:
                return (
                    f"Port {port} of {here} is in use by another program, so the processes of this run cannot meet "
                    f"at {endpoint}. Choose another port, or end that program (`ss -ltnp` shows it)."
                )
    return None


def find_scheduler() -> str | None:
    """Return the program that would start the ranks of a ``--launcher none`` run here, or None."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return "torchrun"
    if "SLURM_JOB_ID" in os.environ or _slurm_answers():
        return "SLURM"
    return None


def _slurm_answers() -> bool:
    """Return whether SLURM answers: its commands may be installed on a machine without a cluster."""
    if not shutil.which("sbatch"):
        return False
    try:
        return subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=5).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def package_versions() -> dict[str, Package]:
    constraints = Path(__file__).parents[2] / "constraints.txt"
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
