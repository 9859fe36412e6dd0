"""Chunked loss of the output layer: the same numbers in less memory."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import altered_model
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.embedded import MODEL_NAMES
from tutorial_lib.engine import build_engine
from tutorial_lib.measure.memory import count_allocations
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer import token_loss_sum

ALONE = Topology(dp=1, tp=1, rank=0)


def engine_of(**flat):
    return build_engine(Config.create(engine="torch", dp=1, **flat), ALONE, 1)


def batch_of(rows, tokens, vocabulary):
    labels = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": labels.clone(), "attention_mask": torch.ones_like(labels), "labels": labels}
    batch["labels"][:, : tokens // 4] = -100
    return batch


def train(engine, batch):
    loss = token_loss_sum(engine.forward(batch), batch["labels"])
    engine.backward(loss / 100)
    return float(loss.detach()), {name: p.grad.clone() for name, p in engine.module.named_parameters()}


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize(
    ("chunks", "tolerance"),
    [(2, 1e-6), (7, 1e-6), pytest.param(10_000, 3e-6, id="a chunk per token, and each sum of 120 chunks rounds")],
)
def test_loss_and_gradients_match_full_logits(name, chunks, tolerance):
    batch = batch_of(3, 40, 500)
    loss, gradients = train(engine_of(model=name), batch)
    chunked_loss, chunked = train(engine_of(model=name, loss_chunks=chunks), batch)
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    for parameter, expected in gradients.items():
        difference = (chunked[parameter] - expected).abs().max()
        assert difference <= tolerance * max(1.0, float(expected.abs().max())), parameter


def test_in_bf16_the_loss_differs_by_what_bf16_rounds():
    batch = batch_of(3, 40, 500)
    losses = [
        token_loss_sum(engine.forward(batch), batch["labels"]).item()
        for engine in (engine_of(precision="bf16"), engine_of(precision="bf16", loss_chunks=4))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_a_batch_without_labels_has_logits():
    engine = engine_of(loss_chunks=2)
    batch = batch_of(2, 16, 500)
    with torch.no_grad():
        assert engine.forward(batch).dim() == 0, "an evaluation needs no logits either"
        logits = engine.forward({name: tensor for name, tensor in batch.items() if name != "labels"})
    assert logits.shape[:2] == (2, 16)


def test_the_peak_does_not_contain_the_logits(tmp_path):
    """With a vocabulary of 40,000, the logits and their gradient are the largest tensors of the step."""
    vocabulary, rows, tokens = 40_000, 4, 128
    altered_model("embedded/gpt2", tmp_path / "large", vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=2)
    batch = batch_of(rows, tokens, vocabulary)
    peaks = {}
    for chunks in (1, 16):
        engine = engine_of(model=str(tmp_path / "large"), random_init=True, loss_chunks=chunks)
        train(engine, batch)  # from now on, gradients exist
        with count_allocations() as allocations:
            train(engine, batch)
        peaks[chunks] = allocations.peak["cpu"]
    logits = 4 * rows * (tokens - 1) * vocabulary
    assert peaks[1] > 2 * logits
    assert peaks[16] < logits / 4, "a chunk's logits, their gradient, and tensors the size of the output layer"


def test_the_hugging_face_trainer_has_no_such_loss():
    with pytest.raises(ConfigError, match="loss_chunks=8 would have no effect: it needs engine='deepspeed' or"):
        Config.create(engine="trainer", loss_chunks=8)
