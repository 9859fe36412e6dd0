"""Greedy answers: a batch gives the same answers as single questions, and the answers are scored."""

import pytest
import torch
from transformers import GenerationConfig

from tutorial_lib.config import ConfigError
from tutorial_lib.dataloader import load_rows
from tutorial_lib.dataloader.tokens import encode_prompt, gold_answers, tokenize_rows
from tutorial_lib.embedded import MODEL_NAMES
from tutorial_lib.models import load_model, load_tokenizer
from tutorial_lib.trainer import answers
from tutorial_lib.trainer.answers import Questions, answer_greedily, evaluate_answers


@pytest.fixture(scope="module")
def rows():
    return load_rows("embedded/qa", "validation", max_examples=6)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_batched_answers_match_answers_one_by_one(name, rows):
    model, tokenizer = load_model(name).eval(), load_tokenizer(name)
    prompts = [encode_prompt(row["question"], row["context"], tokenizer, 96 - 8 * n)[0] for n, row in enumerate(rows)]
    assert len({*map(len, prompts)}) > 1
    together = answer_greedily(model, tokenizer, prompts, max_new_tokens=12, batch_size=6)
    alone = [answer_greedily(model, tokenizer, [ids], max_new_tokens=12, batch_size=1)[0] for ids in prompts]
    assert together == alone and len({*alone}) > 1
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    for ids, answer in zip(prompts, alone, strict=True):
        plain = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=greedy)
        assert tokenizer.decode(plain[0, len(ids) :], skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_prompt_is_the_document_without_its_answer(name, rows):
    tokenizer = load_tokenizer(name)
    for row, document in zip(rows, tokenize_rows(rows, tokenizer, 2048), strict=True):
        prompt, is_cut = encode_prompt(row["question"], row["context"], tokenizer, 2048)
        assert prompt == document["input_ids"][: document["num_uncounted"]] and not is_cut
        shorter, is_cut = encode_prompt(row["question"], row["context"], tokenizer, len(prompt) - 5)
        assert is_cut and len(shorter) == len(prompt) - 5 and shorter[-3:] == prompt[-3:]
    with pytest.raises(ConfigError, match="leaves no room for its context in 5 tokens"):
        encode_prompt(rows[0]["question"], rows[0]["context"], tokenizer, 5)


def test_all_gold_answers_count():
    assert gold_answers({"text": ["a", " ", " b "], "answer_start": [1, 2, 3]}) == ["a", "b"]
    assert gold_answers([{"text": "a"}, {"text": ["b"]}]) == ["a", "b"]
    assert gold_answers("a") == ["a"] and gold_answers(["a", None]) == ["a"] and gold_answers(None) == []


def test_scores_compare_predictions_with_gold_answers(monkeypatch, rows):
    golds = [row["answers"]["text"][0] for row in rows]
    said = [golds[0].upper(), "nothing of the kind", *golds[2:]]
    monkeypatch.setattr(answers, "answer_greedily", lambda *_, **__: said)
    report = evaluate_answers("embedded/gpt2", max_examples=6, seq_length=128)
    assert [answer.prediction for answer in report.answers] == said
    assert [answer.score.exact_match for answer in report.answers] == [1, 0, 1, 1, 1, 1]
    assert report.score.exact_match == pytest.approx(500 / 6) and len(report.answers) == 6
    assert report.num_left_out == 0


def test_questions_that_are_too_long_are_left_out_and_counted():
    questions = Questions.read(
        "embedded/qa", "validation", load_tokenizer("embedded/gpt2"), max_examples=50, seq_length=60
    )
    assert questions.num_left_out > 0 and len(questions.prompts) == len(questions.rows) == 50 - questions.num_left_out
    with pytest.raises(ConfigError, match=r"No question of split 'validation' .* leaves no room for its context in 1 "):
        evaluate_answers("embedded/gpt2", max_examples=2, seq_length=33)


def test_answers_of_one_rank_need_no_other_rank(monkeypatch, rows):
    monkeypatch.setattr(answers, "all_gather_objects", None)
    assert len(evaluate_answers("embedded/gpt2", max_examples=2, seq_length=96).answers) == 2


def test_a_stop_between_two_batches_ends_the_answering_without_a_score():
    questions = Questions.read(
        "embedded/qa", "validation", load_tokenizer("embedded/gpt2"), max_examples=3, seq_length=96
    )
    asked = iter([False, True])
    assert questions.answer(load_model("embedded/gpt2").eval(), 1, stops=lambda: next(asked)) is None
    assert next(asked, "both were asked for") == "both were asked for"


def test_data_without_questions_is_refused():
    with pytest.raises(ConfigError, match="has no column answers, context, question"):
        evaluate_answers("embedded/gpt2", "embedded/news")
