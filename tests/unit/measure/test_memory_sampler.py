"""Memory sampler on real processes, and on GPUs of a stand-in for NVML."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.support.launching import wait_until
from tutorial_lib.measure import memory_sampler
from tutorial_lib.measure.memory_sampler import sample_memory

MIB = 2**20
HOLD = f"import sys; held = b'x' * (64 * {MIB}); print('ready', flush=True); sys.stdin.read()"


def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a Python program that says when it is ready, and ends when its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline()
    return process


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def pids(row: dict[str, Any]) -> set[int]:
    """Return the processes in a reading: this one, a test's own, and helpers that other tests have left running."""
    return {process["pid"] for process in row["processes"]}


def test_the_log_shows_what_this_process_allocates(tmp_path: Path) -> None:
    path = tmp_path / "new" / "memory.jsonl"
    with sample_memory(path, interval=0.02) as log:
        assert log == path and len(rows(log)) >= 1, "the first reading is there when the block begins"
        held = b"x" * (200 * MIB)
        seen = len(rows(log))
        wait_until(lambda: len(rows(log)) >= seen + 3)  # it can be read while it grows
        del held
    found = rows(path)
    sizes = [row["processes"][0]["rss"] for row in found]
    assert 190 * MIB < max(sizes) - sizes[0] < 260 * MIB
    assert {row["processes"][0]["pid"] for row in found} == {os.getpid()}
    times = [row["seconds"] for row in found]
    assert times[0] < 0.1 and times == sorted(times)
    assert json.loads(path.read_text().splitlines()[0])["interval"] == 0.02


def test_pss_is_logged_where_the_system_reports_it(tmp_path: Path) -> None:
    with sample_memory(tmp_path / "log"):
        pass
    process = rows(tmp_path / "log")[0]["processes"][0]
    if sys.platform == "linux":
        assert 0 < process["pss"] <= process["rss"]
    else:
        assert process["pss"] is None


def test_processes_of_other_users_have_only_rss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "memory_full_info", denied)
    with sample_memory(tmp_path / "log"):
        pass
    process = rows(tmp_path / "log")[0]["processes"][0]
    assert process["pss"] is None and process["rss"] > 0


def test_the_thread_ends_with_the_block(tmp_path: Path) -> None:
    with pytest.raises(KeyError), sample_memory(tmp_path / "log", interval=60):
        assert "memory-sampler" in [thread.name for thread in threading.enumerate()]
        raise KeyError  # an error of the block's own goes through
    assert "memory-sampler" not in [thread.name for thread in threading.enumerate()]
    assert len(rows(tmp_path / "log")) == 2, "one reading at the start and one at the end"


def test_a_process_of_another_tree_with_its_children(tmp_path: Path) -> None:
    parent = start(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print('ready', flush=True); child.wait()",
        f"import time; held = b'x' * (64 * {MIB}); print('ready', flush=True); time.sleep(60)",
    )
    [child] = psutil.Process(parent.pid).children()
    try:
        with sample_memory(tmp_path / "log", interval=0.02, pid=parent.pid) as log:
            assert [p["pid"] for p in rows(log)[0]["processes"]] == [parent.pid, child.pid]
            assert rows(log)[0]["processes"][1]["rss"] > 64 * MIB
            parent.kill()
            parent.wait()
            # The child belongs to another parent now. It is followed to its end, which ends the log.
            wait_until(lambda: [p["pid"] for p in rows(log)[-1]["processes"]] == [child.pid])
            child.kill()
            wait_until(lambda: "memory-sampler" not in [thread.name for thread in threading.enumerate()])
        assert rows(log)[-1]["processes"], "no reading is empty"
    finally:
        for process in (parent, child):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        parent.communicate()


def test_processes_that_start_and_end_do_not_disturb_the_sampler(tmp_path: Path) -> None:
    def see_another(seconds: str) -> bool:
        subprocess.run(["/bin/sh", "-c", f"sleep {seconds} & true & wait"], check=True)
        first, *later = map(pids, rows(path))
        return bool(set[int]().union(*later) - first)

    path = tmp_path / "log"
    with sample_memory(path, interval=0.001):
        for _ in range(30):
            see_another("0.005")
        wait_until(lambda: see_another("0.2"))
    assert all(process["rss"] > 0 and process["pss"] != 0 for row in rows(path) for process in row["processes"])


@pytest.mark.parametrize("call", ["name", "memory_full_info", "children"])
def test_a_process_that_ends_during_a_reading_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The child ends just before the named call."""
    child, original = start(HOLD), getattr(psutil.Process, call)

    def end_before(process: psutil.Process, **arguments: Any) -> Any:
        if process.pid == child.pid:
            child.communicate()
        return original(process, **arguments)

    monkeypatch.setattr(psutil.Process, call, end_before)
    pid = child.pid if call == "children" else None
    with contextlib.suppress(ValueError), sample_memory(tmp_path / "log", interval=60, pid=pid) as log:
        seen = pids(rows(log)[0])
        assert os.getpid() in seen and child.pid not in seen
    child.communicate()


def test_a_zombie_holds_no_memory(tmp_path: Path) -> None:
    process = start(HOLD)
    with sample_memory(tmp_path / "log", interval=60):
        process.kill()
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    process.communicate()
    first, last = rows(tmp_path / "log")
    assert process.pid in pids(first) and process.pid not in pids(last)


def test_a_slow_reading_does_not_shift_the_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_slowly(tree: memory_sampler.ProcessTree) -> tuple[memory_sampler.ProcessMemory, ...]:
        time.sleep(0.14)
        return (memory_sampler.ProcessMemory(pid=1, name="test", rss=1, pss=1),)

    monkeypatch.setattr(memory_sampler.ProcessTree, "read", read_slowly)
    with sample_memory(tmp_path / "log", interval=0.2):
        time.sleep(1.3)
    # If the interval were a pause between readings, these would be 0.14, 0.08, 0.02, 0.16 s late, and so on.
    late = [row["seconds"] % 0.2 for row in rows(tmp_path / "log")[1:-1]]
    assert statistics.median(late) < 0.05, late


def test_invalid_sampler_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, -1):
        with pytest.raises(ValueError, match=f"no process {pid}"), sample_memory(tmp_path / "log", pid=pid):
            pass
    for interval in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a positive"), sample_memory(tmp_path / "log", interval=interval):
            pass
    assert not (tmp_path / "log").exists()


def test_a_zombie_is_refused(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: psutil.Process(ended.pid).status() == psutil.STATUS_ZOMBIE)
    with pytest.raises(ValueError, match="shows no memory"), sample_memory(tmp_path / "log", pid=ended.pid):
        pass
    ended.wait()


def test_an_older_log_is_replaced_and_another_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        with sample_memory(path, interval=60):
            pass
        assert len(rows(path)) == 2 and path.read_text().count('"format"') == 1
    path.write_text('{"format": "my notes"}')
    with pytest.raises(FileExistsError, match="another path"), sample_memory(path):
        pass
    assert path.read_text() == '{"format": "my notes"}'


def test_a_full_disk_ends_the_log_but_not_the_run(tmp_path: Path) -> None:
    """A limit on the size of files simulates a full disk."""
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.warns(RuntimeWarning, match=r"ends after \d+ readings: OSError\(27"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
            with sample_memory(tmp_path / "log", interval=0.01):
                wait_until(lambda: "memory-sampler" not in [thread.name for thread in threading.enumerate()])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert (tmp_path / "log").stat().st_size == 4096


# --- GPUs ------------------------------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


class FunctionNotFound(NVMLError):
    pass


class FakeNvml:
    """Two GPUs as NVML shows them. ``failing`` names calls that raise."""

    NVMLError, NVMLError_FunctionNotFound, nvmlMemory_v2 = NVMLError, FunctionNotFound, 2

    def __init__(self, *failing: str) -> None:
        self.failing = set(failing)
        self.open = 0
        self.lost: set[int] = set()
        self.lost_later: set[int] = set()

    def nvmlInit(self) -> None:
        if "init" in self.failing:
            raise NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Test GPU {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        if handle in self.lost:
            raise NVMLError("GPU is lost")
        if version and "v2" in self.failing:
            raise FunctionNotFound
        return SimpleNamespace(total=1000, used=(handle + 1) * 100 + (0 if version else 7))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        if "processes" in self.failing:
            raise NVMLError("Not Supported")
        ours = [(os.getpid(), 30), (os.getpid(), 5), (1, 20), (os.getpid(), None)]
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in (ours if handle == 0 else [])]


def sample_gpus(path: Path, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with sample_memory(path, interval=60):
        nvml.lost |= nvml.lost_later
    assert nvml.open == 0
    return rows(path)


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_a_command_is_logged_and_its_exit_code_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, code: int
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # main would ignore SIGTERM and SIGINT from then on
    log = tmp_path / "log"
    command = [sys.executable, "-c", f"import os, sys; held = bytearray(2**26); {ends}"]
    assert memory_sampler.main([str(log), *command]) == code
    assert memory_sampler.main([str(log)]) == 2
    assert json.loads(log.read_text().splitlines()[0])["format"] == memory_sampler.FORMAT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_all_processes_of_a_job_leaves_the_end_to_the_command(tmp_path: Path, number: int) -> None:
    """As under SLURM, the command and the sampler both get the signal. The command saves, and the sampler waits."""
    saving = f"signal.signal({number:d}, lambda *_: (time.sleep(0.5), sys.exit(7))); print(flush=True)"
    command = [sys.executable, "-c", f"import signal, sys, time; {saving}; time.sleep(60)"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tutorial_lib.measure.memory_sampler", str(tmp_path / "log"), *command],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    os.killpg(process.pid, number)
    assert process.wait(timeout=20) == 7
    process.stdout.close()


def test_every_gpu_and_the_share_of_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = sample_gpus(tmp_path / "log", FakeNvml(), monkeypatch)
    assert first["gpus"] == [
        {"index": 0, "used": 100, "processes": {str(os.getpid()): 35}},
        {"index": 1, "used": 200, "processes": {}},
    ]
    header = json.loads((tmp_path / "log").read_text().splitlines()[0])
    assert header["gpus"][1] == {"index": 1, "name": "Test GPU 1", "total": 1000}


def test_values_that_the_driver_does_not_report_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = sample_gpus(tmp_path / "log", FakeNvml("v2", "processes"), monkeypatch)
    assert [(gpu["used"], gpu["processes"]) for gpu in first["gpus"]] == [(107, {}), (207, {})]


def test_other_gpus_are_sampled_if_one_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    nvml.lost_later.add(1)
    first, last = sample_gpus(tmp_path / "log", nvml, monkeypatch)
    assert [gpu["index"] for gpu in first["gpus"]] == [0, 1] and [gpu["index"] for gpu in last["gpus"]] == [0]


def test_other_gpus_are_sampled_if_one_fails_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    nvml.lost.add(0)
    first, _ = sample_gpus(tmp_path / "log", nvml, monkeypatch)
    assert [gpu["index"] for gpu in first["gpus"]] == [1]


def test_without_a_driver_there_are_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = sample_gpus(tmp_path / "log", FakeNvml("init"), monkeypatch)
    assert first["gpus"] == [] and first["processes"]


def test_the_names_that_are_used_are_nvmls_own() -> None:
    pynvml = pytest.importorskip("pynvml")
    assert all(hasattr(pynvml, name) for name in vars(FakeNvml) if not name.startswith("__"))
    assert issubclass(pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError)
