"""Planner: every layout for training a model on given devices, with its memory, its traffic and its step time.

:func:`plan` evaluates the layouts of :mod:`tutorial_lib.theory.search`, finds those that fit, and orders them by speed:
tokens per second and device, because layouts may differ in their global batch.

The estimate is often off by ten percent (docs/planner-errors.md), so layouts within :data:`TIE` of the fastest count as
equally fast. Among them, layouts without offload come first, then those with less memory, down to :data:`COMFORTABLE`
of the usable memory (a margin for everything that the estimate leaves out), fewer knobs, less sharding, more speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from tutorial_lib.theory.cost import Candidate, evaluate
from tutorial_lib.theory.layouts import Cluster, Layout, Workload, check
from tutorial_lib.theory.search import candidate_layouts, smallest_variants, variants

TIE = 0.05
"""Layouts that are slower than the fastest by at most this share count as equally fast."""

COMFORTABLE = 0.8
"""Share of the usable memory below which saving more of it is pointless."""


def plan(workload: Workload, cluster: Cluster, engine: str = "deepspeed") -> list[Candidate]:
    """Plan all shapes, each with its best micro-batch and checkpointing: those that fit, best first, then the others.

    Shapes that do not fit come with the settings that need the least memory.

    Raises:
        ValueError: the inputs cannot be planned; see :func:`tutorial_lib.theory.layouts.check`.
    """
    check(workload, cluster, engine)
    shapes = [list(_costs(shape, workload, cluster)) for shape in candidate_layouts(workload, cluster, engine)]
    by_shape = [found for found in shapes if found]
    fastest = max((c.tokens_per_gpu_second for found in by_shape for c in found if c.fits), default=0.0)
    chosen = [_best_of_shape(found, cluster, fastest) for found in by_shape]
    fitting = sorted((c for c in chosen if c.fits), key=lambda c: _order(c, cluster, fastest))
    others = sorted((c for c in chosen if not c.fits), key=lambda c: (c.memory, c.host))
    return [dataclasses.replace(c, slower=_why_slower(c, fitting[0], cluster, fastest)) for c in fitting] + others


def something_fits(workload: Workload, cluster: Cluster, engine: str = "deepspeed") -> bool:
    """Return whether :func:`plan` would find a layout that fits, without ranking any."""
    check(workload, cluster, engine)
    smallest = (
        evaluate(workload, cluster, layout)
        for shape in candidate_layouts(workload, cluster, engine)
        for layout in smallest_variants(shape, workload)
    )
    return any(candidate.fits and (workload.allow_missing or not candidate.missing) for candidate in smallest)


def _costs(shape: Layout, workload: Workload, cluster: Cluster) -> Iterable[Candidate]:
    """Evaluate a shape's variants, but no micro-batch larger than one that does not fit.

    Variants that this course's engines cannot run are left out, unless the workload has ``allow_missing``.
    """
    for sizes in variants(shape, workload):
        for layout in sizes:
            candidate = evaluate(workload, cluster, layout)
            if workload.allow_missing or not candidate.missing:
                yield candidate
            if candidate.memory > cluster.usable_memory:
                break


def _best_of_shape(found: list[Candidate], cluster: Cluster, fastest: float) -> Candidate:
    fitting = [c for c in found if c.fits]
    if fitting:
        return min(fitting, key=lambda c: _order(c, cluster, fastest))
    return min(found, key=lambda c: (c.problem.startswith("global"), c.memory))


_TIE_BREAKERS = ("", "offloads", "holds more memory", "more knobs", "shards more", "fewer tokens/s", "larger tp")
"""Reasons that put a layout behind an equally fast one, in the order of :func:`_order`."""


def _order(candidate: Candidate, cluster: Cluster, fastest: float) -> tuple[float, ...]:
    """Return the sort key of a layout that fits: see the module's docstring. Outside a tie, only speed decides."""
    speed, layout = _speed(candidate), candidate.layout
    if not _ties(candidate, fastest):
        return (1, -speed, layout.complexity, layout.zero_stage, layout.tp)
    crowded = max(COMFORTABLE, round(candidate.memory / cluster.usable_memory, 1))
    return (0, layout.offload != "none", crowded, layout.complexity, layout.zero_stage, -speed, layout.tp)


def _ties(candidate: Candidate, fastest: float) -> bool:
    return _speed(candidate) >= (1 - TIE) * fastest


def _speed(candidate: Candidate) -> float:
    return float(f"{candidate.tokens_per_gpu_second:.6g}")  # sums of the same terms differ in their last bits


def _why_slower(candidate: Candidate, best: Candidate, cluster: Cluster, fastest: float) -> str:
    if candidate is best:
        return ""
    percent = 100 * (best.tokens_per_gpu_second / candidate.tokens_per_gpu_second - 1)
    if _ties(candidate, fastest):
        pairs = zip(_order(candidate, cluster, fastest), _order(best, cluster, fastest), _TIE_BREAKERS, strict=True)
        decides = next((name for own, its, name in pairs if own != its), "")
        return f"as fast; {decides}" if decides else "as fast"
    per_token = {
        "computing": (candidate.compute_seconds, best.compute_seconds),
        "launches": (candidate.launch_wait_seconds, best.launch_wait_seconds),
        "tp traffic": (candidate.tp_seconds, best.tp_seconds),
        "dp traffic": (candidate.exposed_dp_seconds, best.exposed_dp_seconds),
        "offload": (candidate.offload_seconds, best.offload_seconds),
        "the update": (candidate.update_seconds, best.update_seconds),
    }
    more = {name: own / candidate.tokens - its / best.tokens for name, (own, its) in per_token.items()}
    cause = max(more, key=lambda name: more[name])
    return f"{percent:,.0f} % slower: {cause}"
