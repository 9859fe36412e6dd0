"""Planner panel: ``python -m tutorial_lib plan`` as widgets, redrawn as you change them.

>>> from tutorial_lib.lab.planner import panel
>>> panel(model="llama-3-8b", gpus=8, gpu="h100")

A bar per layout stacks model states, activations and buffers at their common peak, and lines mark a GPU's usable and
total memory. The table ranks the layouts. The answers come from :mod:`tutorial_lib.theory`, and are cached.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tutorial_lib.lab.figures import BLUE, GREEN, ORANGE
from tutorial_lib.tables import Table, format_short, table
from tutorial_lib.theory.cost import Candidate
from tutorial_lib.theory.hardware import GPUS, find_gpu
from tutorial_lib.theory.known_models import MODELS
from tutorial_lib.theory.layout_reasons import OFFLOAD_WARNING
from tutorial_lib.theory.layouts import ENGINES, Cluster, Workload
from tutorial_lib.theory.plan import plan

BARS = 8
"""Number of layouts to draw and list."""

_PARTS = {"states": BLUE, "activations": ORANGE, "buffers": GREEN}
_SEQUENCES = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
_COUNTS = tuple(1 << n for n in range(11))
_PLANNER_CHOOSES = "automatic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Question that the panel's widgets put to the planner.

    Args:
        model: name of a public model.
        gpu: name of a preset.
        gpus: number of GPUs.
        seq_length: tokens per sequence.
        global_batch: sequences per step; ``None`` means one micro-batch per rank.
        engine: ``deepspeed`` or ``fsdp``.
        only_here: leave out layouts that this course's engines cannot run.
    """

    model: str = "llama-3-8b"
    gpu: str = "h100"
    gpus: int = 8
    seq_length: int = 2048
    global_batch: int | None = None
    engine: str = "fsdp"
    only_here: bool = False


@lru_cache(maxsize=256)
def candidates(question: Question) -> tuple[list[Candidate], Cluster]:
    """Return the layouts, best first, and the cluster.

    Raises:
        ValueError: the preset or the combination cannot be planned.
    """
    preset, dims = find_gpu(question.gpu), MODELS[question.model]
    precision = "bf16" if "bf16" in preset.flops else "fp16"
    cluster = Cluster.of(question.gpu, question.gpus, precision)
    workload = Workload(
        num_params=dims.num_params, dimensions=dims, seq_length=question.seq_length, precision=precision,
        global_batch=question.global_batch, allow_missing=not question.only_here,
    )  # fmt: skip
    return plan(workload, cluster, question.engine), cluster


def answer(question: Question) -> str:
    """Return the answer as HTML: the finding in words, the bars and the table."""
    try:
        found, cluster = candidates(question)
    except ValueError as error:
        return f"<p>{html.escape(str(error))}</p>"
    shown = [c for c in found if c.fits][:BARS] or found[:BARS]
    return f"<p>{html.escape(_finding(found))}</p>{memory_bars(shown, cluster)}{ranked(shown).html()}"


def ranked(shown: list[Candidate]) -> Table:
    """Return the layouts as a table, best first."""
    return table(
        [
            {
                "dp x tp, sharding": _name(c), "micro-batch": c.layout.micro_batch,
                "recomputed": c.layout.checkpointing,
                "GB per GPU": round(c.memory / 1e9, 1), "tokens/s per GPU": _rounded(c.tokens_per_gpu_second),
                "why not": c.problem or c.slower or "the best", "in this course": "no" if c.missing else "yes",
            }
            for c in shown
        ]
    )  # fmt: skip


def memory_bars(shown: list[Candidate], cluster: Cluster) -> str:
    """Return an SVG: a stacked bar per layout, and lines at one GPU's usable and total memory.

    Text and lines take the page's own text colour, which stands out in every theme.
    """
    left, width, right, step, bar, top = 260, 430, 70, 24, 14, 34
    scale = width / max([cluster.gpu_memory, *(c.memory for c in shown)])
    end = top + step * len(shown)
    usable, total = cluster.usable_memory / 1e9, cluster.gpu_memory / 1e9
    alt = f"Peak memory of {len(shown)} layouts, stacked, against {usable:.0f} usable GB per GPU."
    size = f"{left + width + right} {end + 34}"
    lines = [
        f'<svg role="img" aria-label="{html.escape(alt)}" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
        f'style="width:100%;max-width:{left + width + right}px" font-family="sans-serif" font-size="12" '
        'fill="currentColor">'
    ]
    for row, candidate in enumerate(shown):
        y, x = top + step * row, float(left)
        lines.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{html.escape(_name(candidate))}</text>')
        held = candidate.memory - candidate.activations - candidate.buffers
        for part, held_bytes in zip(_PARTS, (held, candidate.activations, candidate.buffers), strict=True):
            length = held_bytes * scale
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{bar}" fill="{_PARTS[part]}">'
                f"<title>{part}: {held_bytes / 1e9:.1f} GB</title></rect>"
            )
            x += length
        lines.append(
            f'<text x="{left + width + right}" y="{y + 11}" text-anchor="end">{candidate.memory / 1e9:.0f} GB</text>'
        )
    for gigabytes, dash, name, anchor in ((usable, "4 3", "usable", "end"), (total, "none", "GPU", "start")):
        x = left + gigabytes * 1e9 * scale
        lines.append(
            f'<line x1="{x:.1f}" y1="{top - 10}" x2="{x:.1f}" y2="{end}" stroke="currentColor" stroke-width="1.5" '
            f'stroke-dasharray="{dash}"/><text x="{x:.1f}" y="{top - 16}" text-anchor="{anchor}">'
            f"{name} {gigabytes:.0f} GB</text>"
        )
    for number, (part, colour) in enumerate(_PARTS.items()):
        x = left + 130 * number
        lines.append(f'<rect x="{x}" y="{end + 12}" width="10" height="10" fill="{colour}"/>')
        lines.append(f'<text x="{x + 15}" y="{end + 21}">{part}</text>')
    return "".join([*lines, "</svg>"])


def panel(**defaults: Any) -> Any:
    """Return the widgets, with their current answer below them.

    Args:
        **defaults: fields of :class:`Question` to start from.
    """
    import ipywidgets

    start = Question(**defaults)
    style = {"description_width": "6em"}

    def choose(label: str, options: Any, value: Any) -> Any:
        return ipywidgets.Dropdown(description=label, options=options, value=value, style=style)

    widgets = {
        "model": choose("model", list(MODELS), start.model),
        "gpu": choose("GPU", list(GPUS), start.gpu),
        "gpus": choose("GPUs", sorted({*_COUNTS, start.gpus}), start.gpus),
        "seq_length": choose("tokens", sorted({*_SEQUENCES, start.seq_length}), start.seq_length),
        "global_batch": choose(
            "batch", [(_PLANNER_CHOOSES, 0), *((str(n), n) for n in sorted({*_COUNTS, start.global_batch or 1}))],
            start.global_batch or 0,  # a dropdown shows None as an empty line
        ),
        "engine": choose("engine", list(ENGINES), start.engine),
        "only_here": ipywidgets.Checkbox(
            description="only what this course's engines have", value=start.only_here, indent=False
        ),
    }  # fmt: skip
    shown = ipywidgets.HTML(answer(start))

    def redraw(_change: Any = None) -> None:
        asked = {name: widget.value for name, widget in widgets.items()}
        shown.value = answer(Question(**asked | {"global_batch": asked["global_batch"] or None}))

    for widget in widgets.values():
        widget.observe(redraw, names="value")
    controls = list(widgets.values())
    return ipywidgets.VBox([ipywidgets.HBox(controls[:3]), ipywidgets.HBox(controls[3:6]), controls[6], shown])


def _finding(found: list[Candidate]) -> str:
    best = found[0]
    if not best.fits:
        smallest = min(found, key=lambda c: c.memory)
        return f"Nothing fits; the smallest layout is {_name(smallest)} with {smallest.memory / 1e9:.0f} GB per GPU."
    more = f" This course's engines do not have {', '.join(best.missing)}." if best.missing else ""
    more += f" {OFFLOAD_WARNING[0].upper()}{OFFLOAD_WARNING[1:]}" if best.layout.offload != "none" else ""
    fitting = sum(c.fits for c in found)
    return (
        f"{_name(best)} with micro-batch {best.layout.micro_batch}: {format_short(best.tokens_per_gpu_second)} "
        f"tokens/s per GPU. Of {len(found)} layouts, {fitting} fit.{more}"
    )


def _rounded(number: float) -> float:
    return round(number) if number >= 100 else round(number, 2)


def _name(candidate: Candidate) -> str:
    layout = candidate.layout
    sequence = " + SP" if layout.sequence_parallel else ""
    off = {"none": "", "optimizer": ", optimizer offloaded", "all": ", all offloaded"}[layout.offload]
    return f"{layout.dp} x {layout.tp}{sequence} {layout.name}{off}"
