"""Default subset of the Hugging Face Trainer on questions: the workshop's, unless the caller gave numbers."""

from __future__ import annotations

import json

import pytest

from tutorial_lib.config import Config
from tutorial_lib.dataloader.subset import choose_subset


def chosen(**flat):
    config, note = choose_subset(Config.create(**({"engine": "trainer", "dataset": "embedded/qa"} | flat)))
    return config.data.max_examples, config.data.max_eval_examples, note


def test_the_trainer_on_questions_takes_the_workshops_subset_and_says_how_to_get_all():
    *numbers, note = chosen()
    assert numbers == [500, 50]
    assert "max_examples=None (--max-examples all) and max_eval_examples=None (--max-eval-examples all)" in note


@pytest.mark.parametrize(
    ("flat", "numbers"),
    [
        ({"engine": "deepspeed"}, (None, 64)),
        ({"dataset": "embedded/news"}, (None, 64)),
        ({"max_examples": None, "max_eval_examples": None}, (None, None)),
        ({"max_examples": 1000}, (1000, 50)),
        ({"max_eval_examples": 64}, (500, 64)),
    ],
)
def test_other_runs_and_given_numbers_stay(flat, numbers):
    assert chosen(**flat)[:2] == numbers


def test_numbers_of_a_saved_configuration_stay():
    given = Config.create(engine="trainer", dataset="embedded/qa", max_examples=None, max_eval_examples=64)
    chosen, note = choose_subset(Config.from_json(given.to_json()))
    assert (chosen.data.max_examples, chosen.data.max_eval_examples, note) == (None, 64, None)


def test_a_resume_keeps_the_rows_of_its_checkpoint_without_reading_the_data():
    config = Config.create(engine="trainer", dataset="gone", max_eval_examples=20)
    chosen, note = choose_subset(config, {"max_examples": None, "max_eval_examples": 64})
    assert (chosen.data.max_examples, chosen.data.max_eval_examples, note) == (None, 20, None)
    chosen, _ = choose_subset(config, {"max_examples": 500, "max_eval_examples": 64})
    assert chosen.data.max_examples == 500


def test_data_with_fewer_rows_is_read_in_full(tmp_path):
    row = {"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 50)
    assert chosen(dataset=str(tmp_path)) == (500, 50, None)
