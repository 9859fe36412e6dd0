"""Doctor: facts about this machine, and a verdict on whether each profile will work.

Without a GPU, a diagnosis takes well under a second. With one, it takes longer, because it imports torch.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
from pathlib import Path
from typing import Any

from tutorial_lib.config import PROFILES, Config
from tutorial_lib.doctor import machine
from tutorial_lib.doctor.machine import rendezvous_problem
from tutorial_lib.doctor.verdict import Report, Verdict, judge

__all__ = ["Report", "Verdict", "diagnose", "judge", "main", "rendezvous_problem"]


def main(json: bool = False) -> int:
    """Print the report as a table or as JSON. Return 0 if at least one profile will work, otherwise 1."""
    report = diagnose()
    print(report.to_json() if json else report.to_text())
    return 0 if any(verdict.works for verdict in report.profiles.values()) else 1


def diagnose() -> Report:
    """Examine this machine without starting a process group."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = machine.memory_within_cgroup(memory.total, memory.available)
    gpus, gpu_problem = machine.find_gpus()
    shm = Path("/dev/shm")
    findings: dict[str, Any] = dict(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=machine.usable_cores(),
        memory_gb=total / machine.GB,
        memory_available_gb=available / machine.GB,
        shm_gb=shutil.disk_usage(shm).free / machine.GB if shm.is_dir() else None,
        disk_free_gb=shutil.disk_usage(Path.cwd()).free / machine.GB,
        gpus=gpus,
        gpu_problem=gpu_problem,
        compiler=machine.find_compiler(),
        ninja=shutil.which("ninja", path=machine.search_path()) is not None,
        operators=machine.operator_states(),
        loopback_problem=machine.loopback_problem(),
        ports={port: machine.port_state(port) for port in (29500, 8888)},
        scheduler=machine.find_scheduler(),
        packages=machine.package_versions(),
    )
    report = Report(**findings, profiles={})
    return dataclasses.replace(report, profiles={name: judge(report, Config.create(name)) for name in PROFILES})
