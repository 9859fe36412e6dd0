"""Collation: examples become the tensors of a batch, padded or packed.

Shapes: B sequences, S tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tutorial_lib.dataloader.packing import DocumentTokens

Batch = dict[str, Tensor]

_IGNORED = -100
_WIDTH_MULTIPLE = 8  # Tensor cores need multiples of 8. Rounding up adds 5 % to short texts (embedded/news).


def fingerprint(batches: Sequence[Batch]) -> int:
    """Hash tokens and labels in order, so that two ranks can tell whether their batches are equal.

    Returns:
        64 bits, as a signed integer.
    """
    digest = hashlib.blake2b(digest_size=8)
    for batch in batches:
        for name in ("input_ids", "labels"):
            digest.update(str(tuple(batch[name].shape)).encode())
            digest.update(batch[name].numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


@dataclass(frozen=True, kw_only=True)
class Collate:
    """Collate function that turns examples into micro-batches, padded on the right.

    Each micro-batch has ``input_ids [B,S]``, ``labels [B,S]`` and ``attention_mask [B,S]``. Labels are not shifted. A
    label is -100 if its token does not count in the loss. The mask is int64, and 0 on padding. Padding is recognised by
    its position, never by its id, because GPT-2's padding token *is* its EOS.

    With ``packed`` batching the mask is ``[B,1,S,S]`` bool. It is True where the row's token may attend to the column's
    token, which must be in the same document and not after it. ``position_ids [B,S]`` restart with each document.
    Padding forms one more document, because softmax over nothing is undefined.
    """

    seq_length: int
    batching: str
    micro_batch: int
    pad_token_id: int

    def __call__(self, examples: list[list[DocumentTokens]]) -> list[Batch]:
        return [
            self._micro_batch(examples[start : start + self.micro_batch])
            for start in range(0, len(examples), self.micro_batch)
        ]

    def _micro_batch(self, examples: list[list[DocumentTokens]]) -> Batch:
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

    def _width(self, examples: list[list[DocumentTokens]]) -> int:
        if self.batching != "longest":
            return self.seq_length
        longest = max(len(tokens) for members in examples for tokens, _ in members)
        return min(self.seq_length, -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE)
