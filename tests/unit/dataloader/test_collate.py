"""Batch tensors: the loss excludes padding but includes EOS, and documents in the same row do not mix."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tutorial_lib.config import Config
from tutorial_lib.dataloader import build_eval_loader, load_rows, tokenize_rows
from tutorial_lib.dataloader.collate import Collate, fingerprint
from tutorial_lib.dataloader.packing import Examples, pack
from tutorial_lib.embedded import MODEL_NAMES
from tutorial_lib.models import load_model, load_tokenizer
from tutorial_lib.mpu import Topology

from .conftest import write_jsonl

EOS = 9


def collate(batching, micro_batch=2, seq_length=16):
    """Return a collator whose padding id is the EOS id, like GPT-2's."""
    return Collate(seq_length=seq_length, batching=batching, micro_batch=micro_batch, pad_token_id=EOS)


def document(*ids, num_uncounted=1):
    return np.array(ids, dtype=np.int32), num_uncounted


@pytest.mark.parametrize("batching, width", [("max_length", 16), ("longest", 8)])
def test_padding_is_not_counted_and_a_real_eos_is(batching, width):
    (batch,) = collate(batching)([[document(1, 2, 3, EOS)], [document(4, 5, 6, 7, EOS, num_uncounted=3)]])

    def filled(start, filler):
        return start + [filler] * (width - len(start))

    assert batch["input_ids"].tolist() == [filled([1, 2, 3, EOS], EOS), filled([4, 5, 6, 7, EOS], EOS)]
    assert batch["labels"].tolist() == [filled([-100, 2, 3, EOS], -100), filled([-100, -100, -100, 7, EOS], -100)]
    assert batch["attention_mask"].tolist() == [filled([1] * 4, 0), filled([1] * 5, 0)]
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("longest, width", [(1, 8), (8, 8), (9, 16), (17, 20), (20, 20)])
def test_longest_pads_to_a_multiple_of_8_within_seq_length(longest, width):
    batches = collate("longest", seq_length=20)([[document(*range(longest))], [document(1)], [document(1)]])
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, width), (1, 8)]


def test_packed_rows_restart_with_each_document():
    examples = [[document(1, 2, EOS), document(3, 4, 5, 6, EOS, num_uncounted=2)], [document(*[7] * 16)]]
    (batch,) = collate("packed")(examples)
    assert batch["input_ids"][0].tolist() == [1, 2, EOS, 3, 4, 5, 6, EOS] + [EOS] * 8
    assert batch["labels"][0].tolist() == [-100, 2, EOS, -100, -100, 5, 6, EOS] + [-100] * 8
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]
    assert batch["position_ids"][1].tolist() == list(range(16))
    assert batch["labels"][1].tolist() == [-100] + [7] * 15
    assert batch["attention_mask"].shape == (2, 1, 16, 16)
    assert batch["attention_mask"].dtype == torch.bool
    owners = [[0] * 3 + [1] * 5 + [2] * 8, [0] * 16]
    for mask, owner in zip(batch["attention_mask"][:, 0].tolist(), owners, strict=True):
        for i in range(16):
            for j in range(16):
                assert mask[i][j] == (owner[i] == owner[j] and j <= i)


def test_collate_can_be_pickled():
    original = collate("packed")
    assert pickle.loads(pickle.dumps(original)) == original


@pytest.mark.parametrize("seed", range(40))
def test_packing_keeps_every_document_whole_and_pads_little(seed):
    draw = random.Random(seed)
    capacity = draw.choice([8, 32, 100])
    lengths = np.array([draw.randint(1, draw.choice([capacity, 5])) for _ in range(draw.randint(1, 300))])
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    totals = sorted(int(lengths[row].sum()) for row in rows)
    assert totals[-1] <= capacity
    assert len(rows) == 1 or totals[0] + totals[1] > capacity, "two rows that fit into one were left apart"
    assert rows == pack(lengths, capacity)


def test_examples_know_their_lengths(byte_tokenizer, toy_directory):
    documents = tokenize_rows(load_rows(toy_directory(30), "train"), byte_tokenizer, 32)
    for examples in (Examples(documents), Examples(documents, pack_to=32)):
        assert examples.lengths.tolist() == [sum(len(ids) for ids, _ in examples[i]) for i in range(len(examples))]
        assert examples.lengths.sum() == sum(map(len, documents["input_ids"]))
    assert len(Examples(documents)) == 30


TEXTS = [
    "The parameters of a model are updated once per step.",
    "Return a logger with the specified name, creating it if necessary.",
    "A short one.",
    "If the file does not exist, an error is raised and nothing is written.",
    "Padding carries no information, and must not enter the loss at all.",
    "Each rank reads its own share.",
]
QUESTIONS = [
    {"question": "Who?", "context": text, "answers": {"text": [text[:9]], "answer_start": [0]}} for text in TEXTS[:4]
]


@pytest.fixture(scope="module", params=MODEL_NAMES)
def family(request):
    return request.param, load_model(request.param).eval(), load_tokenizer(request.param)


def eval_batches(rows, name, tokenizer, directory, **flat):
    write_jsonl(directory / "validation.jsonl", rows)
    config = Config.create(model=name, dataset=str(directory), seq_length=64, dp=1, global_batch=2, **flat)
    return list(build_eval_loader(config, tokenizer, Topology(dp=1, tp=1, rank=0)))


def losses_by_document(model, batches):
    """Return the mean loss of each document over its counted tokens, keyed by those tokens."""
    found = {}
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            logits_BSV = model(**batch).logits
        losses = F.cross_entropy(logits_BSV[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        for row_labels, row_losses in zip(labels[:, 1:].tolist(), losses.tolist(), strict=True):
            run = []
            for label, loss in [*zip(row_labels, row_losses, strict=True), (-100, 0.0)]:
                if label != -100:
                    run.append((label, loss))
                elif run:
                    ids, values = zip(*run, strict=True)
                    found[ids] = sum(values) / len(values)
                    run = []
    return found


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max(abs(left[key] - right[key]) for key in left)


@pytest.mark.parametrize("rows", [[{"text": text} for text in TEXTS], QUESTIONS], ids=["text", "questions"])
def test_a_packed_document_has_the_loss_it_has_alone(family, rows, tmp_path):
    name, model, tokenizer = family
    alone = {}
    for i, row in enumerate(rows):
        batches = eval_batches([row], name, tokenizer, tmp_path / str(i), batching="longest")
        alone.update(losses_by_document(model, [{k: v for k, v in b.items()} for b in batches]))
    assert len(alone) == len(rows)
    packed = eval_batches(rows, name, tokenizer, tmp_path / "packed", batching="packed")
    num_rows = sum(len(batch["input_ids"]) for batch in packed)
    assert num_rows < len(rows), "documents share rows"
    assert largest_difference(losses_by_document(model, [dict(batch) for batch in packed]), alone) < 1e-5
    for batching in ("max_length", "longest"):
        padded = eval_batches(rows, name, tokenizer, tmp_path / batching, batching=batching)
        assert largest_difference(losses_by_document(model, padded), alone) < 1e-5

    def spoilt(change):
        return losses_by_document(model, [{**batch, **change(batch)} for batch in packed])

    def only_causal(batch):
        return {"attention_mask": torch.ones_like(batch["attention_mask"]).tril()}

    assert largest_difference(spoilt(only_causal), alone) > 1e-2, "documents see each other without the mask"
    if name != "embedded/bloom":  # ALiBi only needs distances within a document, which positions do not change
        continued = torch.arange(64).expand(2, -1)
        difference = largest_difference(
            spoilt(lambda batch: {"position_ids": continued[: len(batch["input_ids"])]}), alone
        )
        assert (difference > 1e-2) == (name == "embedded/gpt2"), "rotary positions are relative, learned ones are not"


def test_fingerprints_depend_on_tokens_labels_and_shape():
    one, other = [document(1, 2, 3, EOS)], [document(4, 5, 6, 7, EOS)]
    batches = collate("longest")([one, other])
    assert fingerprint(batches) == fingerprint(collate("longest")([one, other]))
    assert -(2**63) <= fingerprint(batches) < 2**63
    relabelled = [{**batches[0], "labels": batches[0]["labels"].clone().fill_(-100)}]
    reshaped = [{name: batches[0][name].reshape(1, -1) for name in ("input_ids", "labels")}]
    alternatives = [collate("longest")([other, one]), collate("longest", 1)([one, other]), relabelled, reshaped, []]
    assert len({fingerprint(batches), *map(fingerprint, alternatives)}) == 6
