"""Speed: this machine's peak in matrix products, and the ratio of the times that two calls take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def matmul_peak(
    size: int = 1024,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seconds: float = 0.5,
    num_threads: int | None = None,
) -> float:
    """Measure this machine's peak for comparison with a run: the FLOP/s of the fastest square matrix product.

    Measure in the same process as the run, with the same threads, because a vendor's figure says nothing about a shared
    laptop.

    Args:
        size: rows and columns; below about 512 the product does not keep a processor busy.
        dtype: number format of the matrices.
        device: ``cpu`` or a CUDA device.
        seconds: how long to repeat the product.
        num_threads: CPU threads; default: PyTorch's current setting.
    """
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        # Do not time the first product, which includes the library's start-up, and time at least one more.
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
    """Comparison of two procedures: the median, lowest and highest ratio of their times over all pairs."""

    median: float
    lowest: float
    highest: float
    pairs: int


def time_ratio(ours: Callable[[], object], theirs: Callable[[], object], *, pairs: int = 5) -> Ratio:
    """Measure the time of ``ours`` over ``theirs``, alternating, so that a noisy machine disturbs both equally.

    Each is first called once without timing. A ratio below 1 means that ours is faster.
    """
    ours(), theirs()
    ratios = []
    for pair in range(pairs):
        # The second one may find warmer caches, so take turns.
        first, second = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
        one, other = _seconds(first), _seconds(second)
        ratios.append(one / other if pair % 2 == 0 else other / one)
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), pairs)


def _seconds(procedure: Callable[[], object]) -> float:
    began = time.perf_counter()
    procedure()
    return time.perf_counter() - began
