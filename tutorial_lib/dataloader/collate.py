"""Documents -> batches: which examples make up a step, who reads which, and the tensors that come of them.

An *example* is one row of a batch: a document, or with ``packed`` batching as many as fit into ``seq_length``.
Shapes: B sequences, S tokens.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tutorial_lib.config import ConfigError

Batch = dict[str, Tensor]
Document = tuple[NDArray[np.int32], int]
"""Token ids, and how many of the first are no target."""

_IGNORED = -100
_GROUPED_STEPS = 50  # Enough to find neighbours in length, few enough to keep an epoch's order random.
_WIDTH_MULTIPLE = 8  # Tensor cores want it; on short texts (embedded/news) it costs 5 % more tokens.


def fingerprint(batches: Sequence[Batch]) -> int:
    """A number that is the same for the same tokens and labels, in the same order, and for no others that occur.

    Returns:
        64 bits, as a signed integer.
    """
    digest = hashlib.blake2b(digest_size=8)
    for batch in batches:
        for name in ("input_ids", "labels"):
            digest.update(str(tuple(batch[name].shape)).encode())
            digest.update(batch[name].numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


class Examples(Dataset[list[Document]]):
    """Memory-mapped documents, one per example or packed.

    Args:
        documents: columns ``input_ids`` and ``num_uncounted``.
        pack_to: fill examples with whole documents up to this many tokens; None: one document each.
    """

    def __init__(self, documents: datasets.Dataset, *, pack_to: int | None = None) -> None:
        self._documents = documents
        lengths = pc.list_value_length(documents.data.column("input_ids")).to_numpy()
        self._members = None if pack_to is None else pack(lengths, pack_to)
        self.lengths: NDArray[np.int32] = lengths
        """Tokens of each example, without padding."""
        if self._members is not None:
            self.lengths = np.array([lengths[members].sum() for members in self._members], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[Document]:
        ids, uncounted = (self._documents.data.column(name) for name in ("input_ids", "num_uncounted"))
        members = [index] if self._members is None else self._members[index]
        return [(ids[i].values.to_numpy(), uncounted[i].as_py()) for i in members]


def pack(lengths: NDArray[np.integer[Any]], capacity: int) -> list[list[int]]:
    """Distribute documents over rows of ``capacity`` tokens, never splitting one: best fit, longest first.

    Args:
        lengths: tokens of each document, none more than ``capacity``.

    Returns:
        For each row the numbers of its documents. It depends on the arguments alone.
    """
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys, ascending
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


def epoch_order(
    num_examples: int,
    *,
    global_batch: int,
    seed: int,
    epoch: int,
    lengths: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.int64]:
    """Which examples make up each step of an epoch, ``[steps, global_batch]``.

    An epoch is a permutation without its last, incomplete step. Every epoch has another permutation, so that no
    example is always among those left out.

    Args:
        lengths: tokens of each example, to let a step's examples be of similar length: within every 50 steps of the
            permutation (in small data sets every quarter) they are sorted by length, and the steps shuffled again.
    """
    random = np.random.default_rng((seed, epoch))
    steps = num_examples // global_batch
    order = random.permutation(num_examples)[: steps * global_batch]
    if lengths is None:
        return order.reshape(steps, global_batch)
    # Were a whole epoch sorted at once, each epoch would consist of the same steps.
    window = min(_GROUPED_STEPS, max(1, steps // 4)) * global_batch
    windows = [order[start : start + window] for start in range(0, len(order), window)]
    grouped = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in windows])
    return grouped.reshape(steps, global_batch)[random.permutation(steps)]


class StepSampler(Sampler[list[int]]):
    """This data-parallel rank's examples of one optimizer step after another, epoch after epoch without end.

    The examples of a step are dealt out to the ranks like cards. As they are sorted by length where lengths matter,
    ranks get nearly equal token counts, and neighbours in length share a micro-batch. A state counts steps alone, so
    that it holds for any number of ranks.

    Args:
        dp_rank: rank in the *data-parallel* group. Ranks that share a layer (tensor parallelism) share a ``dp_rank``,
            and have to: they work on the same examples.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        global_batch: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
        lengths: NDArray[np.integer[Any]] | None = None,
    ) -> None:
        self.steps_per_epoch = num_examples // global_batch
        self._num_examples, self._global_batch, self._seed, self._lengths = num_examples, global_batch, seed, lengths
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._step = 0
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty((0, 0), dtype=np.int64))

    def examples(self, step: int) -> NDArray[np.int64]:
        """The examples of a step, counted from 0 over all epochs, of all ranks together: ``[global_batch]``."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = epoch_order(
                self._num_examples,
                global_batch=self._global_batch,
                seed=self._seed,
                epoch=epoch,
                lengths=self._lengths,
            )
            self._order = (epoch, order)
        return self._order[1][step_in_epoch]

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            mine = self.examples(self._step)[self._dp_rank :: self._dp_size].tolist()
            self._step += 1
            yield mine

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after ``state["step"]`` steps.

        Raises:
            ConfigError: the state counts steps of another order of examples.
        """
        now = self._identity()
        if changed := [f"{key}={state[key]} then, {now[key]} now" for key in now if state[key] != now[key]]:
            raise ConfigError(
                f"The saved data position belongs to another order of examples: {'; '.join(changed)}. "
                "Resume with the settings of the run that saved it, or start a run of another name."
            )
        self._step = state["step"]

    def _identity(self) -> dict[str, int]:
        return {"examples": self._num_examples, "global_batch": self._global_batch, "seed": self._seed}


@dataclass(frozen=True, kw_only=True)
class Collate:
    """Examples -> micro-batches, padded on the right.

    Each has ``input_ids [B,S]``; ``labels [B,S]``, not shifted, -100 where a token is not counted in the loss; and
    ``attention_mask``: ``[B,S]`` int64, 1 for what is no padding. Padding is known by its place, never by its id:
    GPT-2's padding token *is* its EOS.

    With ``packed`` batching the mask is ``[B,1,S,S]`` bool, True where the token of that row may look at the token of
    that column: its own document, up to itself. ``position_ids [B,S]`` start anew with each document. Padding forms one
    more document, as softmax over nothing is undefined.
    """

    seq_length: int
    batching: str
    micro_batch: int
    pad_token_id: int

    def __call__(self, examples: list[list[Document]]) -> list[Batch]:
        return [
            self._micro_batch(examples[start : start + self.micro_batch])
            for start in range(0, len(examples), self.micro_batch)
        ]

    def _micro_batch(self, examples: list[list[Document]]) -> Batch:
        shape = (len(examples), self._width(examples))
        ids, labels = np.full(shape, self.pad_token_id), np.full(shape, _IGNORED)
        document, positions = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
        for row, members in enumerate(examples):
            start = 0
            for number, (tokens, num_uncounted) in enumerate(members):
                end = start + len(tokens)
                ids[row, start:end] = tokens
                labels[row, start + num_uncounted : end] = tokens[num_uncounted:]
                document[row, start:end] = number
                positions[row, start:end] = np.arange(len(tokens))
                start = end
            positions[row, start:] = np.arange(shape[1] - start)
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        document_BS = torch.from_numpy(document)
        if self.batching != "packed":
            return {**batch, "attention_mask": (document_BS >= 0).long()}
        same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
        return {**batch, "attention_mask": same_BSS.tril()[:, None], "position_ids": torch.from_numpy(positions)}

    def _width(self, examples: list[list[Document]]) -> int:
        if self.batching != "longest":
            return self.seq_length
        longest = max(len(tokens) for members in examples for tokens, _ in members)
        return min(self.seq_length, -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE)
