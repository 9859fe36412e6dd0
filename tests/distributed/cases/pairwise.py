"""Pairwise runs: enough of all valid combinations of settings that every pair of settings still occurs."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from itertools import combinations
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Settings = Mapping[str, Hashable]


def cover(runs: Mapping[Name, Settings], needed: Collection[Name] = ()) -> list[Name]:
    """Choose runs until every pair of settings that occurs in any run occurs in a chosen one.

    This is greedy, so not always minimal: each time, take the run that adds the most pairs; of equals, the first.

    Args:
        runs: the settings of every valid run. All have the same keys.
        needed: runs that are always chosen.
    """
    covers = {name: pairs(settings) for name, settings in runs.items()}
    chosen = set(needed)
    missing = set().union(*covers.values()).difference(*(covers[name] for name in chosen))
    while missing:
        best = max(covers, key=lambda name: len(covers[name] & missing))
        chosen.add(best)
        missing -= covers[best]
    return [name for name in runs if name in chosen]


def pairs(settings: Settings) -> set[tuple[tuple[str, Hashable], ...]]:
    """Return all pairs of ``(setting, value)``."""
    return set(combinations(sorted(settings.items()), 2))
