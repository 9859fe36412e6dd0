"""Rows that are both trained and evaluated on, which are counted by place or by content, and reported."""

from __future__ import annotations

import json
import logging
import shutil

import datasets
import pytest

from tutorial_lib import launch
from tutorial_lib.cli import main
from tutorial_lib.config import Config
from tutorial_lib.dataloader import load_rows
from tutorial_lib.dataloader.train_eval_overlap import count_shared_rows

from .conftest import write_jsonl

NUM_TRAIN, NUM_VALIDATION = 40, 8


@pytest.fixture(scope="module", params=["jsonl", "save_to_disk"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / request.param
    path.mkdir()
    for split, number in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        write_jsonl(path / f"{split}.jsonl", [{"text": f"{split}, row {i}"} for i in range(number)])
    if request.param == "jsonl":
        return path
    saved = path.with_name("saved")
    splits = datasets.load_dataset(str(path))
    # The data set's description still says 40 rows after the first two are gone.
    splits["train"] = splits["train"].select(range(2, NUM_TRAIN))
    splits.save_to_disk(saved)
    return saved


def shared(directory, train_split: str, eval_split: str, **flat) -> int:
    config = Config.create("cpu", dataset=str(directory), train_split=train_split, eval_split=eval_split, **flat)
    data = config.data
    train = load_rows(data.name, train_split, max_examples=data.max_examples)
    return count_shared_rows(data, train, load_rows(data.name, eval_split, max_examples=data.max_eval_examples))


@pytest.mark.parametrize(
    ("train_split", "eval_split", "expected"),
    [
        ("train", "validation", 0),
        ("train[:80%]", "train[80%:]", 0),
        ("train[5%:]", "train[:5%]", 0),
        ("validation", "validation", NUM_VALIDATION),
        ("train+validation", "validation", NUM_VALIDATION),
        ("train+validation[:2]", "validation", 2),
        ("train", "train[-5:]", 5),
        ("train[:20]", "train[15:25]", 5),
        ("train[:10]+train[5:20]", "train[:15]", 15),  # rows that are trained on twice count once
    ],
)
def test_rows_are_counted_by_their_places(directory, train_split, eval_split, expected):
    assert shared(directory, train_split, eval_split) == expected


def test_percentages_of_a_split_that_became_shorter_are_of_its_new_length(directory):
    number = len(load_rows(str(directory), "train"))
    assert shared(directory, "train[:80%]", "train[50%:]") == round(0.8 * number) - round(0.5 * number)


def test_only_the_rows_that_are_read_count(directory):
    assert shared(directory, "train", "train[8:16]", max_examples=8) == 0
    assert shared(directory, "train", "train[8:16]", max_examples=10) == 2
    assert shared(directory, "train[:10]", "train[8:16]", max_eval_examples=1) == 1


def test_every_split_at_once_contains_the_evaluation_rows(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "two"}, {"text": "three"}])
    assert shared(tmp_path, "all", "test") == 2


def test_a_copy_under_another_name_is_noticed(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": str(i)} for i in range(4)])
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "validation.jsonl")
    assert shared(tmp_path, "train", "validation") == 4
    write_jsonl(tmp_path / "validation.jsonl", [{"text": str(i)} for i in range(1, 5)])
    assert shared(tmp_path, "train", "validation") == 0


TINY = {
    "engine": "torch", "dp": 1, "launcher": "none", "dataset": "embedded/news", "steps": 1, "global_batch": 2,
    "seq_length": 32, "max_examples": 8, "max_eval_examples": 4, "name": "shared",
}  # fmt: skip


def test_it_is_said_once_before_training_unless_nothing_is_evaluated(tmp_path, caplog):
    config = Config.create("cpu", storage=str(tmp_path), eval_split="train", **TINY)
    with caplog.at_level(logging.WARNING):
        launch.preflight(config.override(eval_split="validation"))
        launch.preflight(config.override(evaluate=False))
        assert not caplog.messages
        launch.preflight(config)
    (said,) = caplog.messages
    assert "4 of the 4 rows of eval_split='train' are also trained on, in train_split='train'" in said
    assert "train_split='train[5%:]'" in said


def test_the_runs_records_and_its_summary_say_it(tmp_path, capsys):
    flags = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["train", *flags, "--storage", str(tmp_path), "--eval-split", "train[2:]+validation[:1]"]) == 0
    assert json.loads((tmp_path / "shared" / "result.json").read_text())["data"]["eval"]["num_trained_on"] == 4
    assert "4 also trained on, of 4" in capsys.readouterr().out
