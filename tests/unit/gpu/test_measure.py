"""Rehearsal on the CPU of the script that measures the course on a GPU, where time is too precious for a second try."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.gpu import measure, packages, processes
from tests.gpu.cases import Setting
from tests.gpu.processes import MemorySampler, Record, Step, run_step

STARTS_SECONDS = 24
"""Seconds until a process on the H200 machine had imported torch and DeepSpeed, and initialised CUDA."""

FULL = Setting("cuda", "full", "", "")

UNIT = re.compile("(^|_)(bytes|seconds|second|flops|losses|settings)(_|$)")
"""Units in the names of numbers, or of groups of numbers; losses are in nats per token."""

COUNTS_AND_RATIOS = set(
    "cores compared_steps skipped_updates largest_difference tolerance resumed_from num_params mfu_of_measured_peak "
    "last_loss kernel_calls exit_code micro_batch largest_that_fitted calls steps_while_writing steps_after_the_save "
    "predicted measured error".split()
)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Return a function that runs a step with the smallest models and returns the content of its file."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "origins.json").write_text("{}")
    setting = {"device": "cpu", "size": "tiny", "scratch": str(tmp_path / "scratch"), "out": str(tmp_path)}

    def run(step: Step, until: float = math.inf) -> dict[str, Any]:
        said: list[str] = []
        environment = measure.environment(tmp_path / "scratch")
        run_step(step, setting, tmp_path, environment, MemorySampler(), said.append, until)
        return {**json.loads((tmp_path / f"{step.name}.json").read_text()), "said": "\n".join(said)}

    return run


def by_case(content: dict[str, Any]) -> dict[str, Any]:
    return {case["case"]: case for case in content["cases"]}


def numbers(content: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from numbers(value, f"{path}.{key}")
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from numbers(value, f"{path}.{number}")
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield path, content


def test_every_measurement_rehearsed(run: Any, tmp_path: Path) -> None:
    content = run(Step("all", "tests.gpu.rehearsal", limit=270, case_limit=120))
    failed = {name: case.get("error") for name, case in by_case(content).items() if case["status"] != "done"}
    assert content["status"] == "done" and not failed, f"{failed}\n{content['said']}"
    results = {name: case["result"] for name, case in by_case(content).items()}
    for path, number in numbers(results):
        assert math.isfinite(number), path

    machine = results["environment: machine"]
    assert machine["gpu"] is None and machine["host_memory_bytes"] > 2**30 and machine["versions"]["torch"]
    assert results["environment: matrix product"]["bf16_peak_flops"] > 0
    assert results["environment: bandwidth"]["pageable_to_device_bytes_per_second"] > 0
    assert results["environment: DeepSpeed's operators"]["fused_adam"].startswith("left out")

    for engine in ("zero1", "fsdp"):
        compared = results[f"equality: embedded/gpt2 {engine} fp32"]
        assert compared["equal"] and compared["compared_steps"] == 5 and compared["largest_difference"] < 1e-3
    resumed = results["equality: resume zero1"]
    assert resumed["resumed_from"] == 3 and resumed["repeatable"]
    assert resumed["same_losses"] and resumed["same_weights_and_moments"]

    plain, zero1, offloaded = (
        results[f"workshop: bloom-560m: {way}"] for way in ("plain torch", "ZeRO-1", "ZeRO-3, offload all, pinned")
    )
    for case in (plain, zero1, offloaded):
        assert case["samples_per_second"] > 0 and 0 < case["mfu_of_measured_peak"] < 1 and case["mfu"] is None
        assert case["allocator_peak_bytes"] > 0 and case["predicted"]["memory_bytes"] > 0
    # fp32 weights, gradients and moments take 16 bytes per parameter, as measured and as predicted.
    assert plain["states_bytes"]["total"] == plain["predicted"]["states_bytes"] == 16 * plain["num_params"]

    for way in ("without", "with"):
        climbed = results[f"activation_memory: {way} activation checkpointing"]
        assert [row["micro_batch"] for row in climbed["rows"]] == [1, 2] and climbed["first_out_of_memory"] is None
        assert climbed["adapted_to_older_versions"] == []
    with zipfile.ZipFile(tmp_path / "traces.zip") as archive:
        assert archive.namelist() == ["zero1.json.gz", "zero3.json.gz"]
    assert results["traces: ZeRO-1"]["busy_seconds"] > 0 and results["traces: ZeRO-3"]["longest"]
    table = results["workshop_table: 2ZO-1G1N"]
    assert table["row"]["status"] == "done" and len(table["step_losses"]) == 4
    saved = results["async_checkpoint: fsdp"]
    assert saved["checkpoint_bytes"] > 12 * saved["num_params"] and saved["async_write_seconds"] > 0

    without_unit = {
        path.rstrip(".0123456789").rpartition(".")[2]
        for path, _ in numbers(results)
        if ".row." not in path and not any(UNIT.search(part) for part in path.split("."))  # RowRecord has its units
    }
    assert without_unit <= COUNTS_AND_RATIOS


def test_a_failing_case_does_not_affect_other_cases(run: Any) -> None:
    content = run(Step("faults", "tests.gpu.faults", limit=60, case_limit=1.5))
    cases = by_case(content)
    assert {name: case["status"] for name, case in cases.items()} == {
        "before": "done", "raises": "failed", "hangs": "timed out", "dies": "died", "after": "done"
    }  # fmt: skip
    assert content["status"] == "done"
    assert cases["raises"]["error"]["type"] == "ValueError"
    assert "another version" in cases["raises"]["error"]["message"]
    assert "_raise" in cases["raises"]["error"]["traceback"]
    assert "case limit" in cases["hangs"]["error"]["message"]
    assert "exit code 7" in cases["dies"]["error"]["message"]


def test_a_step_ends_at_its_limit_and_lists_the_cases_it_did_not_reach(run: Any) -> None:
    began = time.monotonic()
    content = run(Step("faults", "tests.gpu.faults", limit=2, case_limit=60))
    assert time.monotonic() - began < 20
    assert content["status"] == "timed out"
    assert [case["status"] for case in content["cases"]] == ["done", "failed", "timed out", "not run", "not run"]


def test_the_last_case_may_take_longer_than_the_grace_period(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    content = run(Step("slow", "tests.gpu.slow_exit", limit=60, case_limit=60))
    assert by_case(content)["last"]["status"] == "done"
    assert content["seconds"] < 20, "the process that does not exit was not killed"


def test_a_killed_compiler_leaves_no_lock(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch would wait for the lock without a limit."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    cases = by_case(run(Step("locks", "tests.gpu.compiler_lock", limit=60, case_limit=1.5)))
    assert {name: case["status"] for name, case in cases.items()} == {"killed": "timed out", "again": "done"}


@pytest.mark.parametrize(
    ("steps", "cases", "is_there", "compiles"),
    [
        (["3"], "", False, True),
        (["6", "7"], "", False, True),
        (["1", "3"], "", False, False),  # step 1 compiles it itself
        (["1", "3"], "offload", False, True),
        (["2", "4"], "", False, False),
        (["3"], "", True, False),
    ],
)
def test_cpu_adam_is_compiled_once_before_the_first_step_that_offloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[str], cases: str, is_there: bool, compiles: bool
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(measure, "prebuilt_operators", dict)
    if is_there:
        (tmp_path / "extensions" / "cpu_adam").mkdir(parents=True)
        (tmp_path / "extensions" / "cpu_adam" / "cpu_adam.so").touch()
    ran: list[tuple[str, str]] = []

    def run_step(step: Step, setting: dict[str, Any], *_: Any) -> Record:
        ran.append((step.name, setting["only"]))
        return Record(step, setting, tmp_path / "record", status="done")

    monkeypatch.setattr(measure, "run_step", run_step)
    command = ["--out", str(tmp_path / "out"), "--device", "cpu", "--tiny", "--steps", *steps, "--cases", cases]
    assert measure.main(command) == 0
    assert (ran[0] == ("0-operators", "operators")) is compiles
    assert [name[0] for name, _ in ran[compiles:]] == steps


def test_calls_share_what_they_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    one, other = (measure.environment(tmp_path / name)["TORCH_EXTENSIONS_DIR"] for name in ("one", "other"))
    assert one == other


def test_a_module_that_cannot_be_imported_fails_only_its_step(run: Any) -> None:
    content = run(Step("none", "tests.gpu.no_such_module", limit=60, case_limit=60))
    assert content["status"] == "failed"
    assert "no_such_module" in content["cases"][0]["error"]["message"]


def test_the_total_time_limit_bounds_a_step(run: Any) -> None:
    assert run(Step("faults", "tests.gpu.faults", limit=60, case_limit=60), until=time.time())["status"] == "timed out"


def test_no_step_needs_pytest_or_ray() -> None:
    """A GPU machine may have neither."""
    code = (
        f"import sys; sys.modules |= dict(pytest=None, ray=None); import {', '.join(s.module for s in measure.STEPS)}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=measure.ROOT, timeout=120)


def test_a_call_ends_within_ten_minutes() -> None:
    """A step is ended at that time, whatever its own limit. The results are eight files."""
    assert len(measure.STEPS) + 1 <= 8
    assert max(measure.MINUTES.values()) <= 9.5, "DeepSpeed's last process may take some seconds to end"
    assert all(step.case_limit <= step.limit for step in measure.STEPS)


def test_the_calls_of_the_documentation_have_time_for_all_steps() -> None:
    calls = [call.split() for call in re.findall(r"``--steps ([\d ]+)``", measure.__doc__ or "")]
    assert sorted(chain(*calls)) == [step.name[0] for step in measure.STEPS]
    for call in calls:
        chosen = [step for step in measure.STEPS if step.name[0] in call]
        compiles = "1" not in call and any(step.offloads for step in chosen)
        limits = [step.limit for step in chosen] + [measure.OPERATORS.limit] * compiles
        assert sum(limits) <= 60 * measure.MINUTES["full"], call


def test_the_call_for_what_has_no_figures_yet_names_real_cases() -> None:
    (steps, pattern) = re.findall(r"``--steps ([\d ]+) --cases \"(.*)\"``", " ".join((measure.__doc__ or "").split()))[
        0
    ]
    chosen = {
        step.name[0]: [case for case in importlib.import_module(step.module).cases(FULL) if re.search(pattern, case)]
        for step in measure.STEPS
        if step.name[0] in steps.split()
    }
    assert chosen == {
        "1": ["DeepSpeed's operators"],
        "2": ["SIGTERM"],
        "3": ["bloom-560m: ZeRO-3, offload all", "bloom-560m: ZeRO-3, offload all, pinned"],
        "6": ["fsdp"],
        "7": ["baseline", "2ZO-1G1N", "3ZO-1G1N"],
    }
    committed = (measure.ROOT / "docs/measured/h200").glob("*.json")
    measured = {
        case["case"] for path in committed for case in json.loads(path.read_text())["measured"] if "case" in case
    }
    assert not measured & {*chain(*chosen.values())}, "write the next call into the documentation"


def test_the_case_that_starts_two_processes_comes_first_and_has_time_for_both() -> None:
    from tests.gpu import equality

    name, *_ = equality.cases(FULL)
    assert name == "SIGTERM"
    (step,) = (step for step in measure.STEPS if step.module == equality.__name__)
    assert step.case_limit >= 2 * STARTS_SECONDS + 60


@pytest.mark.parametrize("name", ["equality", "workshop"])
def test_a_step_has_time_for_all_its_cases(name: str) -> None:
    """Committed figures say how long a case took on one H200. Without a figure, it counts as 1.5 times the mean."""
    (step,) = (step for step in measure.STEPS if step.module == f"tests.gpu.{name}")
    committed = json.loads((measure.ROOT / f"docs/measured/h200/{name}.json").read_text())["measured"]
    took = {case["case"]: case["seconds"] for case in committed}
    cases = importlib.import_module(step.module).cases(FULL)
    missing = 1.5 * statistics.mean(took.values())
    seconds = [step.case_limit if case == "SIGTERM" else took.get(case, missing) for case in cases]
    assert STARTS_SECONDS + sum(seconds) <= step.limit


def test_only_missing_packages_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("no_such_package", "hjson"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    modules = {"no-such-package": "no_such_package", "hjson": "hjson", "nor-this": "nor_this"}
    monkeypatch.setattr(packages, "MODULES", modules)
    assert packages.unpack_missing(wheels, tmp_path / "site") == {
        "no-such-package": "no_such_package-1.0-py3-none-any.whl",
        "hjson": "was already installed",
        "nor-this": "missing, and there is no wheel for it",
    }
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == [
        "no_such_package", "no_such_package-1.0.dist-info"
    ]  # fmt: skip
    assert packages.versions(tmp_path / "site")["no-such-package"] == "1.0"


def test_memory_is_read_from_nvidia_smi_where_nvml_has_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 100\necho 700\necho 300\nexec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sampler, began = MemorySampler(), time.time()
    sampler.start()
    try:
        while len(sampler.readings) < 3 and time.time() < began + 20:
            time.sleep(0.01)
    finally:
        sampler.stop()
    assert sampler.source == "nvidia-smi"
    assert sampler.peak(began, time.time()) == 700 * 2**20
    assert sampler.peak(0, 1) is None


def test_a_file_is_never_half_written(tmp_path: Path) -> None:
    record = Record(Step("one", "none", 1, 1), {}, tmp_path / "one.json")
    record.write()
    record.cases.append({"case": "a", "status": "not run"})
    record.write()
    assert json.loads((tmp_path / "one.json").read_text())["cases"] == record.cases
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


@pytest.mark.parametrize(("size", "number"), [("full", 18 + 10), ("quick", 2 * 5)])
def test_number_of_cases_per_gpu(size: str, number: int) -> None:
    from tests.gpu import equality, workshop

    setting = Setting("cuda", size, "", "")
    assert len(workshop.cases(setting)) == number
    compared = equality.cases(setting)
    assert {
        f"embedded/gpt2 zero{stage} {precision}" for stage in range(4) for precision in ("fp32", "bf16", "fp16")
    } < (compared.keys())
    assert "SIGTERM" in compared and "resume zero3" in compared


def test_a_size_that_runs_out_of_memory_gets_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tests.gpu import activation_memory

    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Engine:
        device = torch.device("cpu")

    setting = Setting("cpu", "tiny", "", "")
    model = type("Model", (), {"dimensions": type("Dimensions", (), {"vocabulary": 16})})
    monkeypatch.setattr(activation_memory, "full_rows", lambda *_: [])
    monkeypatch.setattr(activation_memory, "time_steps", out_of_memory)
    assert activation_memory.try_size(setting, Engine(), None, model) is None  # type: ignore[arg-type]


def test_the_command_names_its_missing_argument() -> None:
    done = subprocess.run([sys.executable, "tests/gpu/measure.py"], cwd=measure.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--out DIR" in done.stderr


def test_a_call_that_is_ended_keeps_its_log_and_removes_its_scratch(tmp_path: Path) -> None:
    """``timeout`` sends SIGTERM; the scratch directory of a full measurement may hold 24 GB."""
    (tmp_path / "scratch").mkdir()
    command = [
        sys.executable,
        "tests/gpu/measure.py",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--tiny",
        "--steps",
        "6",
    ]
    with subprocess.Popen(
        command, cwd=measure.ROOT, env=os.environ | {"TMPDIR": str(tmp_path / "scratch")}, stdout=subprocess.DEVNULL
    ) as call:
        record = tmp_path / "6-async-checkpoint.json"
        while call.poll() is None and not (record.exists() and '"running"' in record.read_text()):
            time.sleep(0.05)
        steps = psutil.Process(call.pid).children()
        while call.poll() is None:
            call.terminate()  # more than once, as `timeout` does
            time.sleep(0.01)
        assert call.returncode == 143
    assert psutil.wait_procs(steps, timeout=10)[1] == []
    assert list((tmp_path / "scratch").iterdir()) == []
    with zipfile.ZipFile(tmp_path / "traces.zip") as archive:
        assert archive.namelist() == ["measure.log"]
    assert not (tmp_path / "measure.log").exists()


def test_a_process_whose_driver_is_gone_measures_nothing(tmp_path: Path) -> None:
    """A signal may end the driver just after it has started the process, which does not know that yet."""
    events = tmp_path / "events"
    where = {"scratch": str(tmp_path), "out": str(tmp_path)}
    setting = json.dumps({"device": "cpu", "size": "tiny", **where, "only": "before"})
    for driver, has_run in ((os.getpid(), True), (os.getppid(), False)):
        events.touch()
        command = [sys.executable, "-m", "tests.gpu.cases", "tests.gpu.faults", str(events), "0", setting]
        subprocess.run([*command, str(driver)], cwd=measure.ROOT, stdout=subprocess.DEVNULL, timeout=60)
        assert bool(events.read_text()) == has_run
        events.unlink()
