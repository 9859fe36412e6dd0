"""Memory logs of the sampler, of ``nvidia-smi`` and of ``psrecord``, summarised by peak, mean, modes and timeline.

All memory is in bytes here. ``psrecord`` writes "MB" but means 2^20 bytes, like "MiB" in ``nvidia-smi``.

If the last line has no line break, it is left out, because it is still being written or was cut off. Any other line
that cannot be read is an error.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tutorial_lib.measure.memory_sampler import FORMAT, GpuMemory, ProcessMemory, Reading

MIB = 2**20
MODE_ROUNDING = 10 * MIB
"""Samples are rounded to multiples of this many bytes before the most frequent values are found."""

SMI_QUERY = ("timestamp", "index", "memory.used")
"""First columns of an ``nvidia-smi`` log without a header."""

_ACCEPTED = """Accepted are the logs of
  - tutorial_lib.measure.memory_sampler.sample_memory(path)
  - nvidia-smi --query-gpu=timestamp,index,memory.used --format=csv -l 5 > FILE
  - psrecord PID --include-children --interval 5 --log FILE"""


class MemoryLogError(ValueError):
    """A memory log is missing, empty, damaged, or in an unknown format. The message says what to fix, and where."""


@dataclass(frozen=True, slots=True)
class MemorySummary:
    """Peak, mean and most frequent values of sampled memory, in bytes."""

    counted: str
    """``PSS``, ``RSS`` or ``GPU``."""
    peak: int
    mean: float
    modes: tuple[int, ...]
    """Most frequent values, rounded to ten MiB, in ascending order; empty if no value occurred twice."""
    num_samples: int


@dataclass(frozen=True, slots=True)
class MemorySeries:
    """The memory of one process, one process tree, or one GPU over time."""

    label: str
    counted: str
    """``PSS``, ``RSS`` or ``GPU``: PSS divides a shared page among its processes; RSS counts it in each."""
    seconds: tuple[float, ...]
    """Seconds since the start of the log. A process has samples while it lives."""
    num_bytes: tuple[int, ...]
    pid: int | None = None
    gpu: int | None = None

    def summary(self) -> MemorySummary:
        """Return peak, mean and modes."""
        rounded = [round(value / MODE_ROUNDING) * MODE_ROUNDING for value in self.num_bytes]
        modes = sorted(statistics.multimode(rounded)) if len(set(rounded)) < len(rounded) else []
        mean = statistics.fmean(self.num_bytes)
        return MemorySummary(self.counted, max(self.num_bytes), mean, tuple(modes), len(self.num_bytes))


@dataclass(frozen=True, slots=True)
class MemoryLog:
    """The content of a memory log."""

    path: Path
    source: str
    """``sampler``, ``nvidia-smi`` or ``psrecord``."""
    series: tuple[MemorySeries, ...]

    def __getitem__(self, label: str) -> MemorySeries:
        """Return the series with this label."""
        for series in self.series:
            if series.label == label:
                return series
        raise KeyError(f"{self.path} has no series {label!r}. Write one of: {', '.join(s.label for s in self.series)}")

    def timeline(self, *labels: str) -> dict[str, tuple[tuple[float, ...], tuple[int, ...]]]:
        """Return seconds and bytes by label, for :func:`tutorial_lib.lab.figures.memory_timeline`; default: all."""
        chosen = [self[label] for label in labels] if labels else self.series
        return {series.label: (series.seconds, series.num_bytes) for series in chosen}


def read_memory_log(path: str | Path) -> MemoryLog:
    """Read a log in any of the three formats.

    Raises:
        MemoryLogError: see the class.
    """
    first = next(_lines(Path(path)))[1]
    if first.startswith("{"):
        return read_sampler(path)
    if "Elapsed time" in first:
        return read_psrecord(path)
    if first.startswith("timestamp") or _SMI_TIME.match(first):
        return read_nvidia_smi(path)
    raise MemoryLogError(f"{path} is not a memory log. Its first line is {_excerpt(first)}. {_ACCEPTED}")


def read_sampler(path: str | Path) -> MemoryLog:
    """Read a log of :func:`tutorial_lib.measure.memory_sampler.sample_memory`.

    The first series is ``process tree``. Next come ``process 1 (NAME)`` and so on, in order of appearance. A GPU adds
    ``GPU 0`` and, if the driver reported the share of these processes, ``GPU 0, process tree``. Host memory is PSS if
    every reading has it, otherwise RSS throughout, so that no series mixes the two.

    Raises:
        MemoryLogError: see the class.
    """
    lines = _lines(path := Path(path))
    number, header = next(lines)
    if f'"format": "{FORMAT}"' not in header:
        raise MemoryLogError(f"{path}:{number} is not the header of a sampler's log: {_excerpt(header)}. {_ACCEPTED}")
    readings = [_reading(path, number, line) for number, line in lines]
    if not readings:
        raise MemoryLogError(f"{path} has a header but no reading yet. Read it when the sampler has written one.")
    return MemoryLog(path, "sampler", tuple([*_host_series(readings), *_gpu_series(readings)]))


def read_psrecord(path: str | Path) -> MemoryLog:
    """Read a text log of ``psrecord PID --log FILE``. Its only series is ``process tree``, the column "Real (MB)".

    That is RSS: with ``--include-children``, a page that processes share counts once for each of them.

    Raises:
        MemoryLogError: see the class.
    """
    lines = _lines(path := Path(path))
    number, header = next(lines)
    columns = re.split(r"\s{2,}", header.lstrip("# ").rstrip())
    if columns[:4] != ["Elapsed time", "CPU (%)", "Real (MB)", "Virtual (MB)"]:
        raise MemoryLogError(
            f"{path}:{number} is not the header of psrecord's text log: {_excerpt(header)}. {_ACCEPTED}"
        )
    samples = []
    for number, line in lines:
        try:
            values = [float(cell) for cell in line.split()]
            if len(values) != len(columns):
                raise ValueError(f"{len(values)} columns instead of {len(columns)}")
        except ValueError as error:
            raise _damaged(path, number, line, error) from None
        samples.append((number, values[0], round(values[2] * MIB)))
    return MemoryLog(path, "psrecord", (_in_order(path, "process tree", "RSS", samples),))


def read_nvidia_smi(path: str | Path, *, columns: Sequence[str] | None = None) -> MemoryLog:
    """Read a CSV log of ``nvidia-smi --query-gpu=timestamp,index,memory.used,...``. Its series are ``GPU 0`` and so on.

    Columns may be in any order, mixed with others, with or without units; headers may be repeated.

    Args:
        path: the log.
        columns: the query of a log without a header (``csv,noheader``). By default its first three columns must be
            :data:`SMI_QUERY`, with units for memory.

    Raises:
        MemoryLogError: see the class; or ``columns`` is given for a log that has a header.
    """
    path = Path(path)
    header = list(columns) if columns else None
    samples: dict[int, list[tuple[int, datetime, int]]] = {}
    for number, line in _lines(path):
        cells = [cell.strip() for cell in line.split(",")]
        if any(_SMI_HEADER.match(cell) for cell in cells):
            if columns:
                raise MemoryLogError(f"{path}:{number} is a header. Leave out columns={list(columns)}.")
            header = [cell.split(" [")[0] for cell in cells]
            continue
        at = _smi_columns(path, number, header)
        try:
            if header and len(cells) != len(header):
                raise ValueError(f"{len(cells)} columns instead of {len(header)}")
            time = datetime.strptime(cells[at["timestamp"]], "%Y/%m/%d %H:%M:%S.%f")
            used = _smi_bytes(cells[at["memory.used"]], needs_unit=header is None)
            samples.setdefault(int(cells[at["index"]]), []).append((number, time, used))
        except (ValueError, IndexError) as error:
            raise _damaged(path, number, line, error) from None
    began = min((time for readings in samples.values() for _, time, _ in readings), default=None)
    series = [
        _in_order(
            path, f"GPU {gpu}", "GPU", [(n, (time - began).total_seconds(), used) for n, time, used in readings], gpu
        )
        for gpu, readings in sorted(samples.items())
        if began
    ]
    if not series:
        raise MemoryLogError(f"{path} has a header but no sample yet. Read it when nvidia-smi has written one.")
    return MemoryLog(path, "nvidia-smi", tuple(series))


_SMI_HEADER = re.compile(r"(timestamp|index|memory\.used)\b")
_SMI_TIME = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d")


def _smi_columns(path: Path, number: int, header: Sequence[str] | None) -> dict[str, int]:
    """Return the positions of the three columns of SMI_QUERY."""
    names = list(header or SMI_QUERY)
    if missing := [name for name in SMI_QUERY if name not in names]:
        raise MemoryLogError(
            f"{path}:{number} comes from a query without {', '.join(missing)} ({', '.join(names)}), so its samples "
            f"cannot be told apart. Record it with --query-gpu={','.join(SMI_QUERY)}."
        )
    return {name: names.index(name) for name in SMI_QUERY}


def _smi_bytes(cell: str, *, needs_unit: bool) -> int:
    """Return the bytes in a cell such as ``21658 MiB``, or ``21658`` below a header that says MiB."""
    match = re.fullmatch(r"(\d+)( MiB)?", cell)
    if not match or (needs_unit and not match[2]):
        raise ValueError(f"{cell!r} is not memory such as '21658 MiB'; without a header, pass columns=[...]")
    return int(match[1]) * MIB


def _reading(path: Path, number: int, line: str) -> Reading:
    """Parse a line of the sampler's log."""
    try:
        row = json.loads(line)
        gpus = (
            GpuMemory(each["index"], each["used"], {int(pid): used for pid, used in each["processes"].items()})
            for each in row["gpus"]
        )
        return Reading(row["seconds"], tuple(ProcessMemory(**each) for each in row["processes"]), tuple(gpus))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, number, line, error) from None


def _host_series(readings: Sequence[Reading]) -> Iterator[MemorySeries]:
    """Yield the process tree's memory, then each process's."""
    has_pss = all(process.pss is not None for reading in readings for process in reading.processes)
    counted = "PSS" if has_pss else "RSS"

    def held(process: ProcessMemory) -> int:
        return process.pss if has_pss and process.pss is not None else process.rss

    sums = [sum(held(process) for process in reading.processes) for reading in readings]
    yield MemorySeries("process tree", counted, tuple(reading.seconds for reading in readings), tuple(sums))
    names = {process.pid: process.name for reading in readings for process in reading.processes}
    for place, (pid, name) in enumerate(names.items(), start=1):
        samples = [(r.seconds, held(process)) for r in readings for process in r.processes if process.pid == pid]
        seconds, num_bytes = zip(*samples, strict=True)
        yield MemorySeries(f"process {place} ({name})", counted, seconds, num_bytes, pid=pid)


def _gpu_series(readings: Sequence[Reading]) -> Iterator[MemorySeries]:
    """Yield each GPU's memory, then the process tree's share of it."""
    for index in sorted({gpu.index for reading in readings for gpu in reading.gpus}):
        found = [(reading.seconds, gpu) for reading in readings for gpu in reading.gpus if gpu.index == index]
        seconds = tuple(at for at, _ in found)
        yield MemorySeries(f"GPU {index}", "GPU", seconds, tuple(gpu.used for _, gpu in found), gpu=index)
        if any(gpu.processes for _, gpu in found):
            ours = tuple(sum(gpu.processes.values()) for _, gpu in found)
            yield MemorySeries(f"GPU {index}, process tree", "GPU", seconds, ours, gpu=index)


def _in_order(
    path: Path, label: str, counted: str, samples: Iterable[tuple[int, float, int]], gpu: int | None = None
) -> MemorySeries:
    """Build a series from (line, seconds, bytes), whose seconds must not decrease."""
    samples = list(samples)
    if not samples:
        raise MemoryLogError(f"{path} has a header but no sample yet. Read it when one has been written.")
    for (_, before, _), (number, after, _) in itertools.pairwise(samples):
        if after < before:
            raise MemoryLogError(
                f"{path}:{number} is {before - after:.3f} s earlier than the sample before it. The file holds two "
                "logs, or the clock was set back: split it there and read each part."
            )
    return MemorySeries(label, counted, tuple(s for _, s, _ in samples), tuple(b for _, _, b in samples), gpu=gpu)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield all complete, non-empty lines with their numbers, and refuse a file that has none."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise MemoryLogError(f"{path} does not exist. Check the path, and that its writer was started.") from None
    except OSError as error:
        raise MemoryLogError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise MemoryLogError(f"{path} is not UTF-8 text, so it is not a memory log. {_ACCEPTED}") from None
    if not text:
        raise MemoryLogError(f"{path} is empty: its writer wrote nothing. Look for an error in the writer's output.")
    *complete, _unfinished = text.split("\n")
    found = [(number, line.rstrip()) for number, line in enumerate(complete, start=1) if line.strip()]
    if not found:
        raise MemoryLogError(f"{path} has no complete line yet. Read it when one has been written.")
    return iter(found)


def _damaged(path: Path, number: int, line: str, error: Exception) -> MemoryLogError:
    return MemoryLogError(
        f"{path}:{number} cannot be read ({error}): {_excerpt(line)}. Remove that line if the rest is intact."
    )


def _excerpt(line: str) -> str:
    return repr(line if len(line) <= 80 else line[:77] + "...")
