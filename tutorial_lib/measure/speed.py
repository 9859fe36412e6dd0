"""How fast a run was: tokens per second from its records, and the peak of this machine to compare it with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


def tokens_per_second(rows: Sequence[Mapping[str, Any]], *, skip: int = 1) -> float:
    """Tokens per second over the rows of a run's ``metrics.jsonl``, all ranks together.

    Args:
        rows: with ``tokens`` (counted over all ranks) and ``seconds``.
        skip: leave out this many rows at the start: the first step allocates, compiles and records.

    Raises:
        ValueError: no row is left.
    """
    steady = rows[skip:]
    if not steady:
        raise ValueError(f"{len(rows)} rows without the first {skip} leave none to measure: run more steps.")
    return sum(row["tokens"] for row in steady) / sum(row["seconds"] for row in steady)


def matmul_peak(
    size: int = 1024,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seconds: float = 0.5,
    num_threads: int | None = None,
) -> float:
    """FLOP/s of the fastest square matrix product seen here and now: the peak to state a run's share of.

    Measured in the same process as the run, with the same threads, because a vendor's figure says nothing of a shared
    laptop.

    Args:
        size: rows and columns; below about 512 the product does not fill a processor.
        dtype: arithmetic.
        device: ``cpu`` or a CUDA device.
        seconds: how long to repeat it.
        num_threads: CPU threads; default: as PyTorch is set.
    """
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        # At least one product more than the first, which pays for the library's start.
        best, end = float("inf"), time.perf_counter() + seconds
        for attempt in range(1_000_000):
            wait()
            began = time.perf_counter()
            torch.matmul(a, b, out=out)
            wait()
            now = time.perf_counter()
            if attempt:
                best = min(best, now - began)
            if attempt and now >= end:
                break
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best


@dataclass(frozen=True, slots=True)
class Ratio:
    """How two procedures compare: the median of pairwise ratios of their times, and the pairs' extremes."""

    median: float
    lowest: float
    highest: float
    pairs: int


def time_ratio(ours: Callable[[], object], theirs: Callable[[], object], *, pairs: int = 5) -> Ratio:
    """Time of ``ours`` over time of ``theirs``, alternating, so that a noisy machine disturbs both alike.

    Each is called once before, unmeasured. Below 1 means that ours is faster.
    """
    ours(), theirs()
    ratios = []
    for pair in range(pairs):
        # Whoever goes second may find warmer caches: take turns.
        first, second = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
        one, other = _seconds(first), _seconds(second)
        ratios.append(one / other if pair % 2 == 0 else other / one)
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), pairs)


def _seconds(procedure: Callable[[], object]) -> float:
    began = time.perf_counter()
    procedure()
    return time.perf_counter() - began
