"""Figures of a matrix: model states measured and predicted, peak memory, speed, and memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tutorial_lib.bench.record import RowRecord
from tutorial_lib.lab import figures
from tutorial_lib.lab.figures import Figure
from tutorial_lib.measure.memory_log import MIB, MemoryLogError, read_memory_log


def write(experiment: str, rows: Sequence[RowRecord], logs: Mapping[str, Path], directory: Path) -> list[Path]:
    """Write the figures of all finished rows as PNG files, each with its description as ``.txt``.

    Args:
        experiment: name of the experiment.
        rows: rows of the matrix.
        logs: the sampler's log of each row, by the row's name.
        directory: directory of the matrix.

    Returns:
        The picture files: ``states.png``, ``memory.png``, ``speed.png`` and ``timeline.png``, if there is data for
        them.
    """
    drawn = {
        "states": draw_states(rows),
        "memory": draw_peaks(rows),
        "speed": draw_speed(rows),
        "timeline": draw_timeline(rows, logs),
    }
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            path = directory / f"{name}.png"
            path.write_bytes(figure.png)
            path.with_suffix(".txt").write_text(f"{experiment}: {figure.title}\n{figure.alt}\n", encoding="utf-8")
            written.append(path)
    return written


def draw_states(rows: Sequence[RowRecord]) -> Figure | None:
    """Draw each row's model states per rank, predicted and measured; return None if none were measured."""
    found = {}
    for row in rows:
        if row.states and row.predicted_states:
            pairs = {"predicted": row.predicted_states, "measured": row.states}
            found[row.name] = {
                name: max(states, key=lambda each: each.total).to_dict() for name, states in pairs.items()
            }
    if not found:
        return None
    errors = [abs(row.error_percent) for row in rows if row.error_percent is not None]
    alt = "Stacked bars of parameters, gradients and optimizer states of the rank that holds most. " + " ".join(
        f"{name}: predicted {sum(each['predicted'].values()) / MIB:.2f} MiB, measured "
        f"{sum(each['measured'].values()) / MIB:.2f} MiB."
        for name, each in found.items()
    )
    to = f"to within {max(errors):.2g} %" if max(errors) >= 0.01 else "to within 0.01 %"
    title = f"Model states match the arithmetic {to}"
    return figures.grouped_memory(found, title=title, alt=alt)


def draw_peaks(rows: Sequence[RowRecord]) -> Figure | None:
    """Draw each row's peak memory next to its predicted model states.

    On GPUs, this compares the fullest GPU with one rank's states. On CPUs, it compares all processes together with all
    ranks' states. The rest of the peak is libraries, activations and buffers.
    """
    on_gpu = any(row.gpu for row in rows)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        peak = row.gpu if on_gpu else row.process_tree
        states = row.predicted_device_states[:1] if on_gpu else row.predicted_states
        if peak is None:
            continue
        found[row.name] = {"measured": {"total": float(peak.peak)}}
        if states:
            parts = {part: 1.0 * sum(each.to_dict()[part] for each in states) for part in figures.PARTS}
            found[row.name] = {"predicted": parts, **found[row.name]}
    if not found:
        return None
    peaks = {name: each["measured"]["total"] / MIB for name, each in found.items()}
    what = "GPU" if on_gpu else "process tree"
    least, most = min(peaks, key=peaks.__getitem__), max(peaks, key=peaks.__getitem__)
    return figures.grouped_memory(
        found,
        title=f"Peak of the {what}: least in {least}, most in {most}",
        alt=f"Bars of the peak memory of the {what} beside the predicted model states. "
        + _in_words(peaks, "MiB at its peak"),
        y_label="predicted states, measured peak",
    )


def draw_speed(rows: Sequence[RowRecord]) -> Figure | None:
    """Draw each row's training speed."""
    speeds = {row.name: row.samples_per_second for row in rows if row.samples_per_second}
    if not speeds:
        return None
    fastest = max(speeds, key=speeds.__getitem__)
    return figures.bars(
        speeds, title=f"Speed: {fastest} is the fastest", alt=_in_words(speeds, "samples per second"),
        unit="training speed (samples/s)",
    )  # fmt: skip


def draw_timeline(rows: Sequence[RowRecord], logs: Mapping[str, Path]) -> Figure | None:
    """Draw each row's memory over time: the memory of its process tree or, on GPUs, of the first GPU."""
    series = {}
    for row in rows:
        if not row.is_done:
            continue
        try:
            lines = read_memory_log(logs[row.name]).timeline()
        except MemoryLogError:
            continue
        label = "GPU 0" if row.gpu and "GPU 0" in lines else "process tree"
        series[row.name] = lines[label]
    if not series:
        return None
    peaks = {name: max(held) / MIB for name, (_, held) in series.items()}
    alt = "Memory of each row over the seconds since it began. " + _in_words(peaks, "MiB at its peak")
    return figures.memory_timeline(series, title="Memory over time, by row", alt=alt)


def _in_words(values: Mapping[str, float], unit: str) -> str:
    return " ".join(f"{name}: {value:,.4g} {unit}." for name, value in values.items())
