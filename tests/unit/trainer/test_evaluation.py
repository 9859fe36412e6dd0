"""Evaluation: the loss over answers, and the loss over all tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tutorial_lib.config import Config
from tutorial_lib.dataloader import build_eval_loader
from tutorial_lib.engine import build_engine
from tutorial_lib.models import load_model, load_tokenizer
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer.evaluation import Evaluator

ROWS = 5


def evaluator(tmp_path: Path, **flat: Any) -> tuple[Evaluator, Config]:
    config = Config.create(
        "cpu", model="embedded/bloom", storage=str(tmp_path), engine="torch", launcher="none", seq_length=64,
        max_eval_examples=ROWS, global_batch=2, dp=1, steps=2, evaluate_every="1", **flat,
    )  # fmt: skip
    topology = Topology.from_environment(config.parallel)
    loader = build_eval_loader(config, load_tokenizer(config.model.name), topology)
    return Evaluator(config.run, build_engine(config, topology, 2), loader, topology, steps_per_epoch=2), config


def test_all_tokens_are_questions_contexts_and_answers(tmp_path: Path) -> None:
    evaluating, config = evaluator(tmp_path, dataset="embedded/qa")
    record: dict[str, Any] = {}
    evaluating.note_before(record)
    evaluating.evaluate_if_due(record, 0)
    (noted,) = record["eval_losses"]

    model, total, tokens = load_model(config.model.name), 0.0, 0
    for batch in evaluating.loader:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[mask == 1][None]
            with torch.no_grad():
                total += float(model(input_ids=row, labels=row).loss) * (row.size(1) - 1)
            tokens += row.size(1) - 1
    assert noted["all_tokens"] == pytest.approx(total / tokens, rel=1e-5)
    assert noted["loss"] == record["eval_loss_before"]
    assert abs(noted["all_tokens"] - noted["loss"]) > 0.1


@pytest.mark.parametrize("flat", [{"dataset": "embedded/news"}, {"dataset": "embedded/qa", "batching": "packed"}])
def test_no_all_token_loss_for_unmasked_prompts_or_packed_rows(tmp_path: Path, flat: Any) -> None:
    evaluating, _ = evaluator(tmp_path, **flat)
    record: dict[str, Any] = {}
    evaluating.note_before(record)
    evaluating.evaluate_if_due(record, 0)
    assert "all_tokens" not in record["eval_losses"][0]
