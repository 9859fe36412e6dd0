"""Reasons for the best layout: sentences that compare it with layouts in which one of its settings is different.

Those layouts are evaluated, too, so each sentence says by how much such a layout is slower or too large. Only cp, pp
and offload are described without a comparison.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tutorial_lib.theory.activations import CHECKPOINTING
from tutorial_lib.theory.cost import OFFLOADED_RUN, Candidate, evaluate
from tutorial_lib.theory.layouts import Cluster, Layout, Workload

OFFLOAD_WARNING = (
    f"offload: the one published run was {OFFLOADED_RUN:g} times slower than predicted here (docs/planner-errors.md)."
)


def reasons(workload: Workload, cluster: Cluster, best: Candidate) -> list[str]:
    """Return the sentences, the most important first."""
    layout = best.layout
    found = [
        _sharding(workload, cluster, best),
        _recomputing(workload, cluster, best),
        _micro_batch(workload, cluster, best),
        _reduction(workload, cluster, best),
        _tensor_parallel(workload, cluster, best),
    ]
    if layout.cp > 1:
        how = "all-to-alls (Ulysses)" if layout.ulysses else "a ring"
        held = workload.seq_length // layout.cp
        found.append(
            f"cp={layout.cp}: each GPU holds {held:,} tokens of a sequence; attention sees the others through {how}."
        )
    if layout.pp > 1:
        found.append(f"pp={layout.pp}: a stage holds 1/{layout.pp} of the layers and waits while the pipeline fills.")
    if layout.offload != "none":
        found.append(
            f"offload: nothing that fits is as fast without it; it takes {best.host / 1e9:,.0f} GB of a node's memory."
        )
        found.append(OFFLOAD_WARNING)
    return [sentence for sentence in found if sentence]


def against(best: Candidate, other: Candidate) -> str:
    """Return the end of a sentence about another layout, such as ``is 12 % slower`` or ``is too large by 3.1 GB``."""
    if other.problem.startswith("global batch"):
        sequences = other.layout.micro_batch * other.layout.dp
        return f"makes passes of {sequences} sequences, which do not divide the global batch"
    if other.problem.startswith("host too small by "):
        return f"lacks {other.problem.removeprefix('host too small by ')} of host memory"
    if not other.fits:
        return f"is {other.problem}"
    slower = 100 * (best.tokens_per_gpu_second / other.tokens_per_gpu_second - 1)
    if slower > 0.5:
        return f"is {slower:,.0f} % slower"
    faster = 100 * (other.tokens_per_gpu_second / best.tokens_per_gpu_second - 1)
    if abs(other.memory / best.memory - 1) < 0.005:
        return f"is {f'{faster:,.0f} % faster' if faster > 0.5 else 'as fast'}, with the same peak"
    peaks = "peaks at {} GB instead of {}".format(*_distinct(other.memory / 1e9, best.memory / 1e9))
    return f"is {faster:,.0f} % faster and {peaks}" if faster > 0.5 else peaks


def _distinct(*numbers: float) -> list[str]:
    """Format positive numbers with the decimals that show two digits of the smallest, and how they differ."""
    decimals = max(0, 1 - math.floor(math.log10(min(numbers))))
    while len(texts := [f"{number:.{decimals}f}" for number in numbers]) > len(set(texts)):
        decimals += 1
    return texts


def _sharding(workload: Workload, cluster: Cluster, best: Candidate) -> str:
    layout = best.layout
    less: Layout | None = None
    if layout.strategy == "full_shard" and layout.tp == layout.cp == 1 and layout.offload == "none":
        less = replace(layout, strategy="no_shard", zero_stage=0)
    elif layout.strategy is None and layout.zero_stage > 0 and layout.offload == "none":
        less = replace(layout, zero_stage=layout.zero_stage - 1)
    if less is None or layout.dp == 1:
        return ""
    name = "DDP" if less.strategy else f"ZeRO-{less.zero_stage}"
    other = evaluate(workload, cluster, less)
    if other.missing and not workload.allow_missing:
        return f"{layout.name}: this course's engines do not have {', '.join(other.missing)}."
    return f"{layout.name}: {name} {against(best, other)}."


def _recomputing(workload: Workload, cluster: Cluster, best: Candidate) -> str:
    now = CHECKPOINTING.index(best.layout.checkpointing)
    if workload.checkpointing:
        return ""
    if now == 0:
        other = replace(best.layout, checkpointing="full")
        return f"Nothing is recomputed: full recomputation {against(best, evaluate(workload, cluster, other))}."
    other = replace(best.layout, checkpointing=CHECKPOINTING[now - 1])
    name = "no recomputation" if now == 1 else "selective recomputation"
    return f"{best.layout.checkpointing} recomputation: {name} {against(best, evaluate(workload, cluster, other))}."


def _micro_batch(workload: Workload, cluster: Cluster, best: Candidate) -> str:
    if workload.micro_batch:
        return ""
    size = best.layout.micro_batch
    double = evaluate(workload, cluster, replace(best.layout, micro_batch=2 * size))
    text = f"Micro-batch {size}: {2 * size} {against(best, double)}"
    if size > 1:
        half = evaluate(workload, cluster, replace(best.layout, micro_batch=size // 2))
        text += f"; {size // 2} {against(best, half)}"
    return text + "."


def _reduction(workload: Workload, cluster: Cluster, best: Candidate) -> str:
    if best.layout.strategy in (None, "no_shard") or best.layout.pp > 1 or best.accumulation == 1:
        return ""
    each, once = "with every micro-batch", "once per step"
    now, other = (each, once) if best.layout.reduction == "each" else (once, each)
    changed = replace(best.layout, reduction="last" if now == each else "each")
    return f"Gradients are reduced {now}: {other} {against(best, evaluate(workload, cluster, changed))}."


def _tensor_parallel(workload: Workload, cluster: Cluster, best: Candidate) -> str:
    layout = best.layout
    if layout.tp == 1:
        return ""
    one = replace(
        layout,
        tp=1,
        dp=layout.dp * layout.tp,
        sequence_parallel=False,
        micro_batch=max(1, layout.micro_batch // layout.tp),
    )
    text = f"tp={layout.tp}: without it the layout {against(best, evaluate(workload, cluster, one))}"
    if layout.sequence_parallel:
        plain = evaluate(workload, cluster, replace(layout, sequence_parallel=False))
        text += f"; without sequence parallelism it {against(best, plain)}"
    return text + "."
