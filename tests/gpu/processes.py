"""Processes of one step, which are started, followed, ended in time, and replaced after a crash.

A step is a list of cases (:mod:`tests.gpu.cases`). Its process writes an event when a case starts and when it ends. The
driver turns the events into the step's JSON file after each of them, so that a run that is cut off keeps its results. A
process that dies, or a case that takes too long, costs only that case, because a new process goes on with the next one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.05
GRACE_SECONDS = 10


@dataclass(frozen=True)
class Step:
    """A step of the measurement.

    Args:
        name: name of the step and of its file.
        module: module with a function ``cases(setting)``.
        limit: seconds for the whole step.
        case_limit: seconds for one case.
        offloads: whether it has cases that offload, for which DeepSpeed compiles an operator.
    """

    name: str
    module: str
    limit: float
    case_limit: float
    offloads: bool = False


class MemorySampler:
    """Sampler of the GPU's used memory, many times a second, from outside the processes that use it.

    It asks NVML, or ``nvidia-smi`` if NVML fails. If neither answers, ``readings`` stays empty.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.source = "none"
        self.readings: list[tuple[float, int]] = []
        self._interval = interval
        self._ended = threading.Event()
        self._smi: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin to sample, in a thread that ends with :meth:`stop`."""
        try:
            import pynvml

            pynvml.nvmlInit()
            device = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.readings.append((time.time(), pynvml.nvmlDeviceGetMemoryInfo(device).used))
        except Exception:  # no package, no driver, no GPU: each library error has a type of its own
            self._start_smi()
            return
        self.source = "nvml"

        def sample() -> None:
            while not self._ended.wait(self._interval):
                self.readings.append((time.time(), pynvml.nvmlDeviceGetMemoryInfo(device).used))

        threading.Thread(target=sample, daemon=True).start()

    def _start_smi(self) -> None:
        command = "nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader,nounits -lms 100".split()
        with suppress(OSError):
            self._smi = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.source = "nvidia-smi"
            threading.Thread(target=self._read_smi, args=(self._smi.stdout,), daemon=True).start()

    def _read_smi(self, lines: Any) -> None:
        for line in lines:
            with suppress(ValueError):
                self.readings.append((time.time(), int(line) * 2**20))

    def peak(self, began: float, ended: float) -> int | None:
        """Return the highest reading between two times (in seconds since 1970), or None if there was none."""
        return max((used for at, used in list(self.readings) if began <= at <= ended), default=None)

    def stop(self) -> None:
        """End the thread, and ``nvidia-smi``."""
        self._ended.set()
        if self._smi is not None:
            self._smi.kill()
            self._smi.wait()


@dataclass
class Record:
    """Record of a step: the content of its JSON file."""

    step: Step
    setting: dict[str, Any]
    path: Path
    status: str = "running"
    began: float = field(default_factory=time.time)
    cases: list[dict[str, Any]] = field(default_factory=list)
    changed: float = 0.0

    def write(self) -> None:
        """Replace the file, so that a reader sees the old or the new content, never a mix."""
        self.changed = time.time()
        content = {
            "step": self.step.name,
            "status": self.status,
            "began_unix_seconds": self.began,
            "seconds": round(time.time() - self.began, 3),
            "limit_seconds": self.step.limit,
            "setting": self.setting,
            "cases": self.cases,
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def running(self) -> dict[str, Any] | None:
        """Return the case that has started but not ended, or None."""
        return next((case for case in self.cases if case["status"] == "running"), None)

    def is_over(self) -> bool:
        """Return whether every case has been tried."""
        return bool(self.cases) and self.done() == len(self.cases)

    def done(self) -> int:
        """Return the number of cases that have ended, successfully or not, which is where the next process starts."""
        return sum(case["status"] not in ("not run", "running") for case in self.cases)


def run_step(
    step: Step, setting: dict[str, Any], out: Path, environment: dict[str, str], sampler: MemorySampler,
    say: Callable[[str], None], until: float = float("inf"),
) -> Record:  # fmt: skip
    """Run a step to its end, its limit, or ``until`` (seconds since 1970), and return its record."""
    record = Record(step, setting, out / f"{step.name}.json")
    deadline = min(record.began + step.limit, until)
    scratch = Path(setting["scratch"])
    record.write()
    for attempt in range(100):
        first = record.done()
        events = scratch / f"{step.name}-{attempt}.events"
        events.touch()
        log = scratch / f"{step.name}-{attempt}.log"
        case_arguments = [step.module, str(events), str(first), json.dumps(setting), str(os.getpid())]
        command = [sys.executable, "-m", "tests.gpu.cases", *case_arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )
            why = _follow(process, record, events, sampler, say, deadline)
        remove_locks(environment["TORCH_EXTENSIONS_DIR"], since=record.began)
        say(f"--- {step.name}, output of process {attempt} ---\n{_end_of(log)}---")
        over = record.is_over()
        if why == "step limit":
            record.status = "timed out"
            break
        if over or record.done() == first:  # a process that ended before its first case would do so again
            record.status = "done" if over else "failed"
            break
    if record.status == "failed":
        record.cases.append({"case": "start", "status": "died", "error": {"type": "Died", "message": _end_of(log)}})
    record.write()
    say(f"{step.name}: {record.status} after {time.time() - record.began:.1f} s")
    return record


def _follow(
    process: subprocess.Popen[bytes], record: Record, events: Path, sampler: MemorySampler, say: Callable[[str], None],
    deadline: float,
) -> str:  # fmt: skip
    """Record a process's events until it ends or must be killed, and return why it ended."""
    why = unfinished = ""
    with events.open() as written:
        try:
            while not why:
                ended, now = process.poll() is not None, time.time()
                *lines, unfinished = (unfinished + written.read()).split("\n")
                for line in lines:
                    _take(json.loads(line), record, sampler, say)
                case = record.running()
                if ended:
                    why = f"ended with exit code {process.returncode}"
                elif now > deadline:
                    why = "step limit"
                elif case and now - case["began_unix_seconds"] > record.step.case_limit:
                    why = "case limit"
                elif record.is_over() and now - record.changed > GRACE_SECONDS:
                    why = "all cases have ended, but the process has not"
                time.sleep(_POLL_SECONDS)
        finally:
            _end(process)
    if case := record.running():
        limit = why.endswith("limit")
        case["status"] = "timed out" if limit else "died"
        case["seconds"] = round(time.time() - case["began_unix_seconds"], 3)
        case["nvml_peak_bytes"] = sampler.peak(case["began_unix_seconds"], time.time())
        case["error"] = {"type": "TimedOut" if limit else "Died", "message": f"{why} in this case"}
        say(f"{record.step.name}: {case['case']} {case['status']} ({why})")
        record.write()
    return why


def remove_locks(extensions: str, since: float = 0.0, until: float = float("inf")) -> None:
    """Remove the locks of killed compilers, for which PyTorch would wait without a limit.

    Args:
        extensions: PyTorch's directory of compiled operators.
        since: keep a lock that is older (in seconds since 1970).
        until: keep a lock that is younger.
    """
    for lock in Path(extensions).glob("**/lock"):
        if since <= lock.stat().st_mtime <= until:
            lock.unlink(missing_ok=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, its process group and its descendants, because ninja puts compilers into their own groups."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _take(event: dict[str, Any], record: Record, sampler: MemorySampler, say: Callable[[str], None]) -> None:
    if event["event"] == "plan":
        known = len(record.cases)
        record.cases += [{"case": name, "status": "not run"} for name in event["cases"][known:]]
    elif event["event"] == "start":
        case = record.cases[event["number"]]
        case |= {"status": "running", "began_unix_seconds": event["time"]}
    else:
        case = record.cases[event["number"]]
        case["status"] = "failed" if "error" in event else "done"
        case["seconds"] = round(event["time"] - case["began_unix_seconds"], 3)
        case["nvml_peak_bytes"] = sampler.peak(case["began_unix_seconds"], event["time"])
        case |= {key: event[key] for key in ("result", "error") if key in event}
        told = event.get("error", {}).get("message", "")[:200]
        say(f"{record.step.name}: {case['case']} {case['status']} in {case['seconds']:.1f} s {told}")
    record.write()


def _end_of(log: Path, size: int = 20_000) -> str:
    text = log.read_text(errors="replace")
    return text if len(text) <= size else f"... (the last {size} characters of {len(text)})\n{text[-size:]}"
