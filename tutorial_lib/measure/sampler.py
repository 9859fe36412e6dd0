"""Memory sampler: a log of what a process tree and the machine's GPUs hold over time, read from outside PyTorch.

The log is JSON lines. The first line is a header; each further line is a :class:`Reading`, written at once, so that the
log can be read while it grows. :mod:`tutorial_lib.measure.sampler_log` reads it.

A sampler sees whole processes, libraries and caches included, and misses peaks shorter than its interval. The exact
accounts are in :mod:`tutorial_lib.measure.memory`.

``python -m tutorial_lib.measure.sampler LOG COMMAND ...`` runs a command and logs its memory: batch scripts put it in
front of ``torchrun`` on each node.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

FORMAT = "tutorial_lib.measure.sampler"
"""Value of ``format`` in a log's header."""


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of host memory that one process holds."""

    pid: int
    name: str
    rss: int
    """All resident pages, shared ones in full. Added up over processes, it counts shared pages several times."""
    pss: int | None
    """Like ``rss``, with each shared page divided by the processes that share it, so that it adds up over processes.
    None where the system does not tell: it is not Linux, or the process belongs to somebody else."""


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes in use on one GPU."""

    index: int
    used: int
    """By everybody on this device, as ``nvidia-smi`` reports it."""
    processes: dict[int, int]
    """By process id, for the processes of the tree. In a container that numbers its processes by itself it stays
    empty, because the driver knows them by the host's numbers."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One line of the log."""

    seconds: float
    """Since the sampler started."""
    processes: tuple[ProcessMemory, ...]
    gpus: tuple[GpuMemory, ...]


@contextmanager
def sample_memory(path: str | Path, *, interval: float = 1.0, pid: int | None = None) -> Iterator[Path]:
    """Log the memory of a process tree and of the GPUs for as long as the block runs.

    A thread takes a reading at the start, every ``interval`` seconds, and at the end. It ends early when no process of
    the tree is left. A process that was once seen in the tree is followed until it ends, even if its parent ends first.

    Args:
        path: the log. A memory log that is already there is replaced; any other file is left alone.
        interval: seconds between readings. At 1 s, three processes with PyTorch loaded (0.4 GB each) cost 2.5 % of one
            core: a reading took 25 ms. Nearly all of it goes into PSS, for which Linux walks every page. It grows by
            10 ms with each GiB a process holds (measured on a 2-core virtual machine, without GPUs).
        pid: root of the tree; default: this process.

    Yields:
        The log's path, to read it while it grows.

    Raises:
        ValueError: the interval is not positive, or no process has this id or shows its memory.
        FileExistsError: the file at ``path`` is not a memory log.

    Warns:
        RuntimeWarning: at the end of the block, if the log could not be written to its end.
    """
    if not 0 < interval <= threading.TIMEOUT_MAX:
        raise ValueError(f"interval={interval} is not a time between two readings. Write seconds above 0, such as 1.0.")
    tree = ProcessTree(os.getpid() if pid is None else pid)
    gpus = Gpus()
    try:
        with _create_log(Path(path)) as file:
            recorder = _Recorder(file, tree, gpus, interval)
            recorder.start()
            try:
                yield Path(path)
            finally:
                recorder.stop()
    finally:
        gpus.close()


class ProcessTree:
    """A process and its descendants, which may come and go at any time.

    Args:
        pid: of the root.
    """

    def __init__(self, pid: int) -> None:
        try:
            self._root = psutil.Process(pid)
        except (psutil.Error, ValueError) as error:
            raise ValueError(f"There is no process {pid} to sample: it has ended, or its id is another one.") from error
        self._known: dict[psutil.Process, None] = {self._root: None}
        if not self.read():
            raise ValueError(
                f"Process {pid} shows no memory: it has ended, or it belongs to somebody else. Sample as its owner."
            )

    def read(self) -> tuple[ProcessMemory, ...]:
        """Return the memory of every process that is alive now, the root first; nothing once all have ended."""
        self._known = {process: None for process in self._look_around() if process.is_running()}
        return tuple(memory for process in self._known if (memory := _read_process(process)))

    def _look_around(self) -> dict[psutil.Process, None]:
        """Return the known processes and all their descendants."""
        found: dict[psutil.Process, None] = {}
        for process in self._known:
            if process not in found:  # otherwise its descendants are there already
                found[process] = None
                with suppress(psutil.Error):
                    found |= dict.fromkeys(process.children(recursive=True))
        return found


def _read_process(process: psutil.Process) -> ProcessMemory | None:
    """Return the memory of a process, or None if it ends meanwhile or has ended and waits for its parent (a zombie)."""
    try:
        name = process.name()
        try:
            memory = process.memory_full_info()
        except psutil.AccessDenied:
            memory = process.memory_info()
    except psutil.Error:
        return None
    pss = getattr(memory, "pss", None)
    # The kernel takes a process's memory away before the process itself: what is read in between is 0.
    return None if memory.rss == 0 or pss == 0 else ProcessMemory(process.pid, name, memory.rss, pss)


class Gpus:
    """This machine's NVIDIA GPUs through NVML; none where there is no driver.

    Attributes:
        described: index, name and bytes of each.
    """

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        self._handles: dict[int, Any] = {}
        self._open = False
        self.described: list[dict[str, Any]] = []
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._open = True
            for index in range(pynvml.nvmlDeviceGetCount()):
                self._describe(index)

    def _describe(self, index: int) -> None:
        with suppress(self._nvml.NVMLError):  # one that fails, or has no memory of its own
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            total = self._memory(handle).total
            self.described.append({"index": index, "name": self._nvml.nvmlDeviceGetName(handle), "total": total})
            self._handles[index] = handle

    def read(self, pids: set[int]) -> tuple[GpuMemory, ...]:
        """Return the memory of every GPU, and the share of each of these processes. A GPU that fails is left out."""
        readings = []
        for index, handle in self._handles.items():
            with suppress(self._nvml.NVMLError):
                readings.append(GpuMemory(index, self._memory(handle).used, self._by_process(handle, pids)))
        return tuple(readings)

    def close(self) -> None:
        """Let go of the driver."""
        if self._open:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _memory(self, handle: Any) -> Any:
        try:  # The first version of this call counts what the driver keeps to itself as used; nvidia-smi does not.
            return self._nvml.nvmlDeviceGetMemoryInfo(handle, version=self._nvml.nvmlMemory_v2)
        except self._nvml.NVMLError_FunctionNotFound:
            return self._nvml.nvmlDeviceGetMemoryInfo(handle)

    def _by_process(self, handle: Any, pids: set[int]) -> dict[int, int]:
        used: dict[int, int] = {}
        with suppress(self._nvml.NVMLError):
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid in pids and process.usedGpuMemory is not None:
                    used[process.pid] = used.get(process.pid, 0) + process.usedGpuMemory
        return used


class _Recorder:
    """The thread that takes the readings and writes them down."""

    def __init__(self, file: TextIO, tree: ProcessTree, gpus: Gpus, interval: float) -> None:
        self._file, self._tree, self._gpus, self._interval = file, tree, gpus, interval
        self._began = time.perf_counter()
        self._num_readings = 0
        self._failure: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def start(self) -> None:
        """Write the header and the first reading, then go on in the thread."""
        self._write({"format": FORMAT, "interval": self._interval, "gpus": self._gpus.described})
        self._record()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and write the last reading; warn if the log is not complete."""
        self._stopped.set()
        self._thread.join()
        if not self._failure:
            self._try_to_record()
        if self._failure:
            warnings.warn(
                f"The memory log {self._file.name} ends after {self._num_readings} readings: {self._failure!r}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _run(self) -> None:
        while not self._stopped.wait(self._until_next()):
            if not self._try_to_record():
                return

    def _until_next(self) -> float:
        """Return the seconds to the next multiple of the interval: a slow reading does not shift the later ones."""
        return self._interval - (time.perf_counter() - self._began) % self._interval

    def _try_to_record(self) -> bool:
        """Return whether to go on. A measurement that fails must not end what it measures."""
        try:
            return self._record()
        except Exception as error:
            self._failure = error
            return False

    def _record(self) -> bool:
        """Write one reading; return False without writing once no process is left."""
        seconds = round(time.perf_counter() - self._began, 4)
        processes = self._tree.read()
        if not processes:
            return False
        gpus = self._gpus.read({process.pid for process in processes})
        self._write(asdict(Reading(seconds, processes, gpus)))
        self._num_readings += 1
        return True

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def _create_log(path: Path) -> TextIO:
    """Open a new log for appending, in place of an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open("rb") as file:
            beginning = file.read(len(_HEADER_BEGINS))
        if beginning not in (b"", _HEADER_BEGINS):
            raise FileExistsError(f"{path} is not a memory log, so it is not replaced. Write another path for the log.")
        path.unlink()
    return path.open("a", encoding="utf-8")


_HEADER_BEGINS = f'{{"format": "{FORMAT}"'.encode()


def main(arguments: Sequence[str]) -> int:
    """Run a command and log the memory of its processes, and of this one; returns the command's exit code."""
    if len(arguments) < 2:
        print("usage: python -m tutorial_lib.measure.sampler LOG COMMAND ...", file=sys.stderr)
        return 2
    path, *command = arguments
    # A scheduler signals all processes of a job. The command decides what that means; this one waits for its end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with sample_memory(path), subprocess.Popen(command) as process:
        code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
