"""Ranks of a benchmark, started like the ranks of a run by the local launcher, and the ratio of two calls' times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from unittest import mock

from tests.support.launching import ROOT
from tutorial_lib import launch
from tutorial_lib.config import Config


def run_on_ranks(module: str, configs: Sequence[Config]) -> list[launch.Run]:
    """Run the module's ``main``, which writes each run's result, on every rank in place of the training worker."""
    with mock.patch.dict("os.environ", PYTHONPATH=str(ROOT)):
        return launch.run_all(configs, worker=module)


def time_ratio(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> dict[str, float]:
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
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "pairs": pairs}


def _seconds(procedure: Callable[[], object]) -> float:
    began = time.perf_counter()
    procedure()
    return time.perf_counter() - began
