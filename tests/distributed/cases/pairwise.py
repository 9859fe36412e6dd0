"""Pairwise runs: a selection of the valid combinations of settings in which every pair of settings still occurs."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from itertools import combinations
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Settings = Mapping[str, Hashable]


def cover(runs: Mapping[Name, Settings], needed: Collection[Name] = ()) -> list[Name]:
    """Choose runs until every pair of settings that occurs in any run occurs in a chosen one.

    The search is greedy, so the result is not always minimal. It adds the run with the most missing pairs, or the first
    of several, until no pair is missing.

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
