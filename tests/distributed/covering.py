"""A few runs for many: of all valid combinations of settings, enough that every pair of them still occurs."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from itertools import combinations
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Settings = Mapping[str, Hashable]


def cover(runs: Mapping[Name, Settings], needed: Collection[Name] = ()) -> list[Name]:
    """Choose runs until every pair of settings that occurs in any run occurs in a chosen one.

    Greedy, and so not the fewest possible: each time, take the run that adds most pairs, and of equals the first.

    Args:
        runs: the settings of every valid run. All have the same keys.
        needed: runs to choose in any case.
    """
    chosen = set(needed)
    missing = {pair for name in runs for pair in pairs(runs[name])}
    missing -= {pair for name in chosen for pair in pairs(runs[name])}
    while missing:
        best = max(runs, key=lambda name: len(pairs(runs[name]) & missing))
        chosen.add(best)
        missing -= pairs(runs[best])
    return [name for name in runs if name in chosen]


def pairs(settings: Settings) -> set[tuple[tuple[str, Hashable], ...]]:
    """Return all pairs of ``(setting, value)``."""
    return set(combinations(sorted(settings.items()), 2))
