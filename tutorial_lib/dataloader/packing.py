"""Packing: the documents that share a row of a batch.

An *example* is one row of a batch: a single document, or with ``packed`` batching several that fit into ``seq_length``
together.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch.utils.data import Dataset

from tutorial_lib.dataloader.tokens import summary_of

DocumentTokens = tuple[NDArray[np.int32], int]
"""Token ids, and the number of leading ones that are not targets."""


class Examples(Dataset[list[DocumentTokens]]):
    """Memory-mapped documents, one per example or packed.

    Args:
        documents: columns ``input_ids`` and ``num_uncounted``.
        pack_to: fill examples with complete documents up to this many tokens; None: one document each.
    """

    def __init__(self, documents: datasets.Dataset, *, pack_to: int | None = None) -> None:
        self._documents = documents
        self.summary = summary_of(documents)
        lengths = pc.list_value_length(documents.data.column("input_ids")).to_numpy()
        self._members = None if pack_to is None else pack(lengths, pack_to)
        self.lengths: NDArray[np.int32] = lengths
        """Number of tokens in each example, without padding."""
        if self._members is not None:
            self.lengths = np.array([lengths[members].sum() for members in self._members], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[DocumentTokens]:
        ids, uncounted = (self._documents.data.column(name) for name in ("input_ids", "num_uncounted"))
        members = [index] if self._members is None else self._members[index]
        return [(ids[i].values.to_numpy(), uncounted[i].as_py()) for i in members]


def pack(lengths: NDArray[np.integer[Any]], capacity: int) -> list[list[int]]:
    """Distribute documents over rows of ``capacity`` tokens without splitting any: best fit, longest first.

    Args:
        lengths: number of tokens in each document, at most ``capacity``.
        capacity: number of tokens in a row.

    Returns:
        For each row, the indices of its documents. The result depends only on the arguments.
    """
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of rows_by_space, ascending
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            space, row = capacity, len(rows)
            rows.append([])
        else:
            space = spaces[at]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[at]
        rows[row].append(document)
        left = space - length
        if left and left not in rows_by_space:
            rows_by_space[left] = []
            insort(spaces, left)
        if left:
            rows_by_space[left].append(row)
    return rows
