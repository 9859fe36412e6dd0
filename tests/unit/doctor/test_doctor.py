"""Doctor: it examines this machine, and judges machines that are described to it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from tutorial_lib import cli, doctor
from tutorial_lib.config import Config
from tutorial_lib.doctor import machine

H200 = machine.Gpu("H200", 150.0, "9.0", True)
T4 = machine.Gpu("T4", 16.0, "7.5", False)


@pytest.fixture(scope="module")
def here() -> doctor.Report:
    return doctor.diagnose()


@pytest.fixture
def laptop(here: doctor.Report) -> doctor.Report:
    """Describe a machine on which only the CPU profile works, whatever this machine is."""
    return dataclasses.replace(
        here,
        python="3.11.9",
        cores=2,
        memory_available_gb=8.0,
        shm_gb=4.0,
        gpus=(),
        gpu_problem="no NVIDIA driver answers here. Use --profile cpu, or a machine with a GPU",
        compiler="g++ 12",
        ninja=True,
        operators={name: "compiled" for name in machine.OPERATORS},
        loopback_problem=None,
        scheduler=None,
        packages={"torch": machine.Package("2.13.0+cpu", "2.13.0")},
    )


def judge(report: doctor.Report, profile: str, **changes: object) -> doctor.Verdict:
    return doctor.judge(dataclasses.replace(report, **changes), Config.create(profile))  # type: ignore[arg-type]


# --- this machine -----------------------------------------------------------------------------------------------------


def test_the_cpu_profile_works_where_these_tests_run(here: doctor.Report) -> None:
    assert here.profiles["cpu"] == dataclasses.replace(here.profiles["cpu"], works=True, problems=())
    assert set(here.profiles) == {"cpu", "gpu", "cluster"}


def test_figures_agree_with_the_system(here: doctor.Report) -> None:
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert 0 < here.memory_available_gb <= here.memory_gb < 1e5
    assert here.packages["torch"].version is not None
    assert here.packages["torch"].as_expected


def test_json_holds_the_full_report(here: doctor.Report, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {field.name for field in dataclasses.fields(doctor.Report)}
    assert printed["profiles"]["cpu"]["works"] is True
    assert printed["packages"]["deepspeed"]["version"] == here.packages["deepspeed"].version


def test_table_has_a_line_for_every_finding_and_verdict(here: doctor.Report) -> None:
    text = here.to_text()
    for label in ("cores", "memory", "/dev/shm", "GPUs", "compiler", "operators", "loopback", "ports", "torch"):
        assert any(line.startswith(label) for line in text.splitlines()), label
    assert "profile cpu: will work" in text


def test_without_a_gpu_nothing_heavy_is_imported() -> None:
    """This keeps the answer fast; torch is imported only if a driver reports a GPU."""
    code = (
        "import sys; from tutorial_lib import doctor; gpus = doctor.diagnose().gpus;"
        "print([m for m in ('torch', 'deepspeed', 'ray', 'transformers') if m in sys.modules and not gpus])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a driver report GPUs A and B of 80 GB, which torch cannot use."""
    for name, answer in {
        "Init": lambda: None,
        "Shutdown": lambda: None,
        "DeviceGetCount": lambda: 2,
        "DeviceGetHandleByIndex": lambda index: index,
        "DeviceGetName": lambda handle: "AB"[handle],
        "DeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80e9),
    }.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", answer)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")


def raises(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_a_gpu_may_have_no_memory_of_its_own(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, laptop: doctor.Report
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", raises(pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)))
    gpus, problem = machine.find_gpus()
    assert [gpu.memory_gb for gpu in gpus] == [None, None] and "torch is built for CUDA 13.0" in (problem or "")
    assert "A (memory unknown); B (memory unknown)" in dataclasses.replace(laptop, gpus=gpus).to_text()


def test_a_gpu_that_fails_is_named(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(handle: int) -> str:
        if handle == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return "B"

    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", name)
    (gpu,), problem = machine.find_gpus()
    assert gpu.name == "B" and "GPU 0 does not answer the NVIDIA driver (GPU is lost)" in (problem or "")


def test_a_gpu_that_fails_in_torch_is_a_problem(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", raises(RuntimeError("CUDA error: lost\nCompile with")))
    gpus, problem = machine.find_gpus()
    assert [gpu.name for gpu in gpus] == ["A", "B"] and problem == "torch cannot use the GPUs: CUDA error: lost"


def test_a_taken_port_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert machine.port_state(port) == "in use"
    assert machine.port_state(port) == "free"


def test_an_impossible_rendezvous_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        assert "is in use by another program" in (doctor.rendezvous_problem(f"127.0.0.1:{taken}") or "")
    assert doctor.rendezvous_problem(f"127.0.0.1:{taken}") is None
    # Only that other machine can tell whether its port is free.
    assert doctor.rendezvous_problem(f"192.0.2.1:{taken}") is None
    assert doctor.rendezvous_problem(f"[::1]:{taken}") is None  # an address in brackets, as torchrun takes it
    for host in ("no-such-host.invalid", "two..dots"):
        assert f"getent hosts {host}" in (doctor.rendezvous_problem(f"{host}:29500") or "")
    for endpoint in ("node1", "node1:", ":29500", "node1:99999"):
        assert "is not HOST:PORT" in (doctor.rendezvous_problem(endpoint) or "")
    assert cli.main(["doctor", "--rendezvous", "node1"]) == cli.BAD_CONFIGURATION
    assert "is not HOST:PORT" in capsys.readouterr().err


def test_a_machine_without_ipv6_can_be_a_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    no_ipv6 = OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
    monkeypatch.setattr(machine.socket, "socket", raises(no_ipv6))
    assert doctor.rendezvous_problem("[::1]:29500") is None


def test_the_lock_of_a_killed_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "prebuilt_operators", dict)
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert machine.operator_states()["cpu_adam"] == "not compiled"  # a build may be running
    os.utime(lock, (0, 0))
    assert machine.operator_states()["cpu_adam"] == f"locked by {lock}"


@pytest.mark.parametrize(("named", "found"), [("", True), ("  ", True), ("no-such-compiler", False)])
def test_an_empty_compiler_variable_means_the_default_compiler(
    monkeypatch: pytest.MonkeyPatch, named: str, found: bool
) -> None:
    monkeypatch.setenv("CXX", named)
    monkeypatch.setattr(machine.shutil, "which", lambda name: sys.executable if name == "g++" else None)
    assert (machine.find_compiler() is not None) == found


@pytest.mark.parametrize(("prints", "shown"), [("", "{}"), (r"g++ \351", "g++ \ufffd")])
def test_a_compiler_that_prints_little_or_other_characters_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str, shown: str
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\nprintf '{prints}'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert machine.find_compiler() == shown.format(compiler)


def test_a_build_may_end_while_its_lock_is_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "prebuilt_operators", dict)
    removed = {"**/cpu_adam/lock": [tmp_path / "lock"]}
    monkeypatch.setattr(Path, "glob", lambda cache, pattern: removed.get(pattern, []))
    assert machine.operator_states()["cpu_adam"] == "not compiled"


def test_files_that_a_container_has_read_are_not_used_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": "8000", "memory.current": "7900", "memory.stat": "anon 900\ninactive_file 6000\nfile 6500"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.memory_within_cgroup(20_000, 10_000) == (8000, 6100)
    assert machine.memory_within_cgroup(20_000, 5_000) == (8000, 5000)
    assert machine.memory_within_cgroup(7_000, 5_000) == (7000, 5000), "the limit is beyond the machine's memory"


# --- other machines ---------------------------------------------------------------------------------------------------


def test_a_laptop_runs_only_the_cpu_profile(laptop: doctor.Report) -> None:
    assert judge(laptop, "cpu") == doctor.Verdict(True, (), ())
    for profile in ("gpu", "cluster"):
        verdict = judge(laptop, profile)
        assert not verdict.works
        assert verdict.problems == (laptop.gpu_problem,)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"python": "3.10.12"}, "Run make setup PYTHON=python3.13"),
        ({"python": "3.14.0"}, "Run make setup PYTHON=python3.13"),
        ({"packages": {"ray": machine.Package(None, "2.60.0")}}, "not installed: ray. Run make setup"),
        ({"loopback_problem": "no route"}, "processes cannot talk over 127.0.0.1 (no route)"),
        ({"memory_available_gb": 1.0}, "1.0 GB of memory is free, but 2 workers need about 4 GB"),
        ({"operators": {"cpu_adam": "not compiled"}, "compiler": None}, "has to compile cpu_adam"),
        ({"operators": {"cpu_adam": "not compiled"}, "ninja": False}, "has to compile cpu_adam"),
    ],
)
def test_problems_that_rule_out_the_cpu_profile(
    laptop: doctor.Report, changes: dict[str, object], problem: str
) -> None:
    verdict = judge(laptop, "cpu", **changes)
    assert not verdict.works
    assert len(verdict.problems) == 1
    assert problem in verdict.problems[0]


@pytest.mark.parametrize(
    "changes, note",
    [
        ({"operators": {"cpu_adam": "not compiled"}}, "make setup does it in advance"),
        ({"operators": {"cpu_adam": "locked by /x/lock"}}, "a run will hang"),
        ({"shm_gb": 0.06}, "--shm-size=1g"),
        ({"packages": {"ray": machine.Package("2.61.0", "2.60.0")}}, "ray is 2.61.0, tested with 2.60.0"),
    ],
)
def test_notes_do_not_make_a_verdict_negative(laptop: doctor.Report, changes: dict[str, object], note: str) -> None:
    verdict = judge(laptop, "cpu", **changes)
    assert verdict.works
    assert len(verdict.notes) == 1
    assert note in verdict.notes[0]


def test_a_gpu_machine_runs_the_gpu_profile(laptop: doctor.Report) -> None:
    assert judge(laptop, "gpu", gpus=(H200,), gpu_problem=None) == doctor.Verdict(True, (), ())


def test_bf16_by_emulation_does_not_count(laptop: doctor.Report) -> None:
    verdict = judge(laptop, "gpu", gpus=(T4,), gpu_problem=None)
    assert verdict.problems == ("T4 has no native bf16. Write --precision fp16 or fp32",)


def test_fewer_gpus_than_ranks(laptop: doctor.Report) -> None:
    box = dataclasses.replace(laptop, gpus=(H200,), gpu_problem=None)
    verdict = doctor.judge(box, Config.create("gpu", dp=4))
    assert verdict.problems == ("needs 4 GPUs, but this machine has 1. Write --dp 1",)


@pytest.mark.parametrize(("code", "found"), [(0, "SLURM"), (1, None)])
def test_slurm_counts_only_if_its_commands_respond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, found: str | None
) -> None:
    """Commands alone prove nothing, because ``make cluster-tools`` installs them without a cluster."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name in ("sbatch", "sinfo"):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.find_scheduler() == found


def test_a_login_node_without_gpus_can_submit(laptop: doctor.Report) -> None:
    verdict = judge(laptop, "cluster", scheduler="SLURM")
    assert verdict.works
    assert "SLURM can start jobs on nodes with GPUs" in verdict.notes[0]


def test_a_gpu_machine_without_a_scheduler_is_pointed_to_torchrun(laptop: doctor.Report) -> None:
    verdict = judge(laptop, "cluster", gpus=(H200, H200), gpu_problem=None)
    assert verdict.works
    assert "python -m torch.distributed.run --nproc_per_node 2" in verdict.notes[0]
