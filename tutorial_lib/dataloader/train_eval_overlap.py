"""Rows that a run both trains and evaluates on, found by their places in the data set, or because splits are equal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import datasets

from tutorial_lib.config import DataConfig

Places = list[tuple[str, int, int]]
"""Ranges of rows: the name of a split, the first row, and one past the last."""


def count_shared_rows(data: DataConfig, train: datasets.Dataset, evaluation: datasets.Dataset) -> int:
    """Return how many evaluation rows are also training rows.

    Args:
        data: names the two splits.
        train: the training rows, from ``load_rows``.
        evaluation: the evaluation rows.
    """
    if shared := count_shared_places(data, evaluation):
        return shared
    is_copy = len(train) == len(evaluation) and train.data.table.equals(evaluation.data.table)
    return len(evaluation) if is_copy else 0


def count_shared_places(data: DataConfig, rows: datasets.Dataset) -> int:
    """Return how many evaluation rows are training rows by place, as when ``train[50%:]`` overlaps ``train[:80%]``.

    Args:
        data: names the two splits.
        rows: rows of either split, from ``load_rows``: they know how long all splits are.
    """
    lengths = {name: split.num_examples for name, split in rows.info.splits.items()}
    try:
        trained = sorted(_places(data.train_split, data.max_examples, lengths))
    except ValueError:  # there is no such split: nothing will train, but evaluating alone is possible
        return 0
    evaluated = _places(data.eval_split, data.max_eval_examples, lengths)
    return sum(
        _num_covered(first, end, ((start, to) for name, start, to in trained if name == split))
        for split, first, end in evaluated
    )


def _places(split: str, max_examples: int | None, lengths: Mapping[str, int]) -> Places:
    """Return the places of a split's rows, in order."""
    spec = "+".join(lengths) if split == "all" else split
    found, left = [], sum(lengths.values()) if max_examples is None else max_examples
    for part in datasets.ReadInstruction.from_spec(spec).to_absolute(lengths):
        end = min(part.to, part.from_ + left)
        left -= end - part.from_
        found.append((part.splitname, part.from_, end))
    return found


def _num_covered(first: int, end: int, ranges: Iterable[tuple[int, int]]) -> int:
    """Return how many rows from ``first`` up to ``end`` are in any of the sorted ranges."""
    covered = 0
    for start, to in ranges:
        start, to = max(start, first), min(to, end)
        covered += max(0, to - start)
        first = max(first, to)
    return covered
