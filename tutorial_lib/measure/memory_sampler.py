"""Memory sampler: a log of the memory of a process tree and of the machine's GPUs, measured from outside PyTorch.

The log consists of JSON lines. The first line is a header; each further line is a :class:`Reading`, flushed when
written, so the log can be read while it grows. :mod:`tutorial_lib.measure.memory_log` reads it.

A sampler sees entire processes, including libraries and caches, but misses peaks shorter than its interval. For exact
numbers see :mod:`tutorial_lib.measure.memory`.

``python -m tutorial_lib.measure.memory_sampler LOG COMMAND ...`` runs a command and logs its memory. Batch scripts put
it in front of ``torchrun`` on each node.
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

FORMAT = "tutorial_lib.measure.memory_sampler"
"""Value of ``format`` in a log's header."""


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of host memory that one process holds."""

    pid: int
    name: str
    rss: int
    """All resident pages, with shared ones in full: a sum over processes counts shared pages several times."""
    pss: int | None
    """Like ``rss``, with each shared page divided among the processes that share it, so that it adds up over processes.
    None if the system does not report it: it is not Linux, or the process belongs to another user."""


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes in use on one GPU."""

    index: int
    used: int
    """Total use of the device by all processes, as in ``nvidia-smi``."""
    processes: dict[int, int]
    """Use by process id, for the processes of the tree. Empty in a container with its own process ids, because the
    driver only knows the host's."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One line of the log."""

    seconds: float
    """Seconds since the sampler started."""
    processes: tuple[ProcessMemory, ...]
    gpus: tuple[GpuMemory, ...]


@contextmanager
def sample_memory(path: str | Path, *, interval: float = 1.0, pid: int | None = None) -> Iterator[Path]:
    """Log the memory of a process tree and of the GPUs while the block runs.

    A thread takes a reading at the start, every ``interval`` seconds, and at the end. It stops early if no process of
    the tree is left. A process that was once seen in the tree is followed until it ends, even if its parent ends first.

    Args:
        path: the log. An existing memory log is replaced; any other file is left alone.
        interval: seconds between readings. At 1 s, three processes with PyTorch loaded (0.4 GB each) cost 2.5 % of one
            core: a reading took 25 ms, much of it for PSS, for which Linux walks every page (measured on a 2-core
            virtual machine, without GPUs).
        pid: root of the tree; default: this process.

    Yields:
        The log's path, to read it while it grows.

    Raises:
        ValueError: the interval is not positive, or no process has this id, or its memory cannot be read.
        FileExistsError: the file at ``path`` is not a memory log.

    Warns:
        RuntimeWarning: at the end of the block, if the log is incomplete.
    """
    if not 0 < interval <= threading.TIMEOUT_MAX:
        raise ValueError(f"interval={interval} must be a positive number of seconds. Write 1.0, for example.")
    tree = ProcessTree(os.getpid() if pid is None else pid)
    gpus = Gpus()
    try:
        with _closing_quietly(_create_log(Path(path))) as file:
            recorder = _Recorder(file, tree, gpus, interval)
            recorder.start()
            try:
                yield Path(path)
            finally:
                recorder.stop()
    finally:
        gpus.close()


@contextmanager
def _closing_quietly(file: TextIO) -> Iterator[TextIO]:
    """Close a file at the end of the block, ignoring errors: on a full disk, closing fails like the last write."""
    try:
        yield file
    finally:
        with suppress(OSError):
            file.close()


class ProcessTree:
    """A process and its descendants, which may come and go at any time.

    Args:
        pid: process id of the root.
    """

    def __init__(self, pid: int) -> None:
        try:
            self._root = psutil.Process(pid)
        except (psutil.Error, ValueError) as error:
            raise ValueError(f"There is no process {pid} to sample: it has ended, or the id is wrong.") from error
        self._known: dict[psutil.Process, None] = {self._root: None}
        if not self.read():
            raise ValueError(
                f"Process {pid} shows no memory: it has ended, or it belongs to another user. Sample as that user."
            )

    def read(self) -> tuple[ProcessMemory, ...]:
        """Return the memory of every live process, the root first; an empty tuple once all have ended."""
        self._known = {process: None for process in self._find_processes() if process.is_running()}
        return tuple(memory for process in self._known if (memory := _read_process(process)))

    def _find_processes(self) -> dict[psutil.Process, None]:
        """Return the known processes and all their descendants."""
        found: dict[psutil.Process, None] = {}
        for process in self._known:
            if process not in found:  # otherwise its descendants are already included
                found[process] = None
                with suppress(psutil.Error):
                    found |= dict.fromkeys(process.children(recursive=True))
        return found


def _read_process(process: psutil.Process) -> ProcessMemory | None:
    """Return the memory of a process, or None if it has ended or is a zombie."""
    try:
        name = process.name()
        try:
            memory = process.memory_full_info()
        except psutil.AccessDenied:
            memory = process.memory_info()
    except psutil.Error:
        return None
    pss = getattr(memory, "pss", None)
    # The kernel frees a process's memory before the process disappears; readings in between are 0.
    return None if memory.rss == 0 or pss == 0 else ProcessMemory(process.pid, name, memory.rss, pss)


class Gpus:
    """This machine's NVIDIA GPUs, read through NVML. Without a driver there are none.

    Attributes:
        described: index, name and bytes of each GPU.
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
        with suppress(self._nvml.NVMLError):  # the GPU fails, or has no memory of its own
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            total = self._memory(handle).total
            self.described.append({"index": index, "name": self._nvml.nvmlDeviceGetName(handle), "total": total})
            self._handles[index] = handle

    def read(self, pids: set[int]) -> tuple[GpuMemory, ...]:
        """Return the memory of every GPU, and each process's share of it. A GPU that fails is left out."""
        readings = []
        for index, handle in self._handles.items():
            with suppress(self._nvml.NVMLError):
                readings.append(GpuMemory(index, self._memory(handle).used, self._by_process(handle, pids)))
        return tuple(readings)

    def close(self) -> None:
        """Release the driver."""
        if self._open:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _memory(self, handle: Any) -> Any:
        try:  # Version 1 of this call counts memory reserved by the driver as used; nvidia-smi does not.
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
    """Thread that takes readings and writes them to the log."""

    def __init__(self, file: TextIO, tree: ProcessTree, gpus: Gpus, interval: float) -> None:
        self._file, self._tree, self._gpus, self._interval = file, tree, gpus, interval
        self._began = time.perf_counter()
        self._num_readings = 0
        self._failure: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def start(self) -> None:
        """Write the header and the first reading, then continue in the thread."""
        self._write({"format": FORMAT, "interval": self._interval, "gpus": self._gpus.described})
        self._record()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and write the last reading; warn if the log is incomplete."""
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
        """Return the seconds to the next multiple of the interval, so that a slow reading does not shift later ones."""
        return self._interval - (time.perf_counter() - self._began) % self._interval

    def _try_to_record(self) -> bool:
        """Take a reading and return whether to continue. A failed measurement must not end the measured program."""
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
    """Open a new log for appending, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open("rb") as file:
            beginning = file.read(len(_HEADER_BEGINS))
        if beginning not in (b"", _HEADER_BEGINS):
            raise FileExistsError(
                f"{path} is not a memory log, so it is not replaced. Choose another path for the log."
            )
        path.unlink()
    return path.open("a", encoding="utf-8")


_HEADER_BEGINS = f'{{"format": "{FORMAT}"'.encode()


def main(arguments: Sequence[str]) -> int:
    """Run a command, log the memory of its processes and of this one, and return the command's exit code."""
    if len(arguments) < 2:
        print("usage: python -m tutorial_lib.measure.memory_sampler LOG COMMAND ...", file=sys.stderr)
        return 2
    path, *command = arguments
    # A scheduler signals all processes of a job. The command decides what to do; this process waits for it to end.
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a command inherits an ignored signal, but no handler
            signal.signal(number, lambda *_: None)
    with sample_memory(path), subprocess.Popen(command) as process:
        code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
