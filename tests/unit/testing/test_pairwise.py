"""Pairwise runs: a few runs cover every pair of settings, and the choice is always the same."""

from __future__ import annotations

import pytest

from tests.distributed.cases import equivalence
from tests.distributed.cases.pairwise import cover, pairs

# Every combination of three settings with three values each, except for a large model on a grid of one.
GRID = {
    f"{model}-{grid}-{stage}": {"model": model, "grid": grid, "stage": stage}
    for model in ("small", "medium", "large")
    for grid in (1, 2, 4)
    for stage in (None, 1, 3)
    if (model, grid) != ("large", 1)
}


def all_pairs(settings):
    return set().union(*map(pairs, settings))


def test_pairs_combine_different_settings():
    assert pairs({"model": "small", "grid": 1, "stage": None}) == {
        (("grid", 1), ("model", "small")),
        (("grid", 1), ("stage", None)),
        (("model", "small"), ("stage", None)),
    }


def test_every_pair_that_occurs_is_covered_by_fewer():
    chosen = cover(GRID)
    assert all_pairs(GRID[name] for name in chosen) == all_pairs(GRID.values())
    assert 9 <= len(chosen) <= 12 < len(GRID)


def test_the_choice_is_deterministic_and_keeps_the_order():
    chosen = cover(GRID)
    assert chosen == cover(dict(GRID)) == [name for name in GRID if name in chosen]


def test_required_combinations_are_chosen_and_count():
    dispensable = next(name for name in GRID if name not in cover(GRID))
    assert dispensable in cover(GRID, [dispensable])
    assert cover(GRID, list(GRID)) == list(GRID)


@pytest.mark.skipif(equivalence.MATRIX, reason="all combinations are run")
def test_make_test_meets_every_pair_of_settings_of_the_matrix():
    chosen, everything = map(
        all_pairs, (map(equivalence.settings, c) for c in (equivalence.COMBINATIONS, equivalence.VALID_COMBINATIONS))
    )
    assert chosen == everything
    assert (("case", "bloom"), ("ranks", 4)) in everything
    assert len(equivalence.COMBINATIONS) < len(equivalence.VALID_COMBINATIONS)
