"""Embedded data sets: their schemas and rows, and splits that share nothing."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet
import pytest
from datasets import ClassLabel, load_dataset
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from transformers import AutoTokenizer

from tutorial_lib.config import ConfigError
from tutorial_lib.embedded import (
    DATASET_NAMES,
    corpora,
    dataset_directory,
    model_directory,
)
from tutorial_lib.embedded.corpora import NEWS_LABELS, rows
from tutorial_lib.embedded.documents import SPLITS, TEXT, documents
from tutorial_lib.embedded.extract import pack

ROOT = Path(__file__).parents[3]

COLUMNS = {
    "embedded/news": {"text", "label"},
    "embedded/articles": {"text"},
    "embedded/qa": {"id", "title", "context", "question", "answers"},
}
ROWS = {
    "embedded/news train": (3612, "462679a8f1da0050d97cf890"),
    "embedded/news validation": (553, "10eca7b8eb0377038ccf1111"),
    "embedded/news test": (529, "e09d082ca8cb0ed1da3fa1d7"),
    "embedded/articles train": (1249, "38913c4df083d040deac38ab"),
    "embedded/articles validation": (164, "402464871183d8b41e5ce624"),
    "embedded/articles test": (162, "34308535f5072c732716890e"),
    "embedded/qa train": (2755, "1273fe52ad70ef0474b807b3"),
    "embedded/qa validation": (350, "bcf5adf3e64dcfb95b741ade"),
    "embedded/qa test": (339, "c261c6bc21eecb5ade421dab"),
}
"""Number of rows in every split, and their hash. Losses in notebooks and weights of models depend on these rows."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build all three data sets from scratch, so that no cache on this machine hides a change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTORIAL_LIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {name: dataset_directory(name) for name in DATASET_NAMES}


@pytest.fixture(scope="module")
def loaded(built, tmp_path_factory):
    """Load the built data sets with `datasets`, offline."""
    cache = str(tmp_path_factory.mktemp("hf"))
    return {name: load_dataset(str(directory), cache_dir=cache) for name, directory in built.items()}


def hashed(found: list[dict]) -> tuple[int, str]:
    return len(found), hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:24]


def hashed_files(directories: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Hash the rows of built data sets, read back from their parquet files."""
    return {
        f"embedded/{file.parent.name} {file.stem}": hashed(pyarrow.parquet.read_table(file).to_pylist())
        for directory in directories
        for file in directory.iterdir()
    }


def test_the_rows_are_the_committed_ones(built):
    """If you mean to change them, build the models and execute the notebooks again, too."""
    assert {f"{name} {split}": hashed(rows(name, split)) for name in DATASET_NAMES for split in SPLITS} == ROWS
    assert hashed_files(built.values()) == ROWS


def test_a_python_without_packages_gives_the_same_rows():
    """The rows must not depend on the interpreter. This one has no installed packages, and randomizes string hashes."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tutorial_lib.embedded.corpora import rows
import json
names, splits = json.loads(sys.argv[1])
print(json.dumps({{f"{{name}} {{split}}": rows(name, split) for name in names for split in splits}}))
"""
    command = [sys.executable, "-I", "-S", "-c", code, json.dumps([DATASET_NAMES, SPLITS])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {name: hashed(found) for name, found in json.loads(done.stdout).items()} == ROWS


def test_a_jupyter_kernel_builds_the_same_rows(tmp_path):
    """A kernel replaces some built-in functions, such as ``input``, together with their docstrings."""
    code = f"""
import builtins, os
os.environ["TUTORIAL_LIB_CACHE"] = {str(tmp_path)!r}
from tutorial_lib.embedded import DATASET_NAMES, dataset_directory
for name in DATASET_NAMES:
    print(dataset_directory(name))
assert "ipykernel" in builtins.input.__module__ or not builtins.input.__doc__
"""
    done = NotebookClient(new_notebook(cells=[new_code_cell(code)]), kernel_name="python3", timeout=60).execute()
    directories = "".join(output.text for output in done.cells[0].outputs).split()
    assert hashed_files(map(Path, directories)) == ROWS


def test_the_shipped_text_is_what_the_extraction_writes():
    assert gzip.decompress(pack(list(documents()))) == gzip.decompress(TEXT.read_bytes())


@pytest.mark.parametrize("name", DATASET_NAMES)
def test_schema(loaded, name):
    assert set(loaded[name]) == set(SPLITS)
    for split in SPLITS:
        assert set(loaded[name][split].column_names) == COLUMNS[name]


def test_a_different_text_rule_or_library_gets_its_own_directory(monkeypatch, tmp_path):
    for name in ("documents.jsonl.gz", "documents.py", "corpora.py"):
        shutil.copy(corpora.TEXT.with_name(name), tmp_path)
    before = corpora.content_hash()
    monkeypatch.setattr(corpora, "TEXT", tmp_path / "documents.jsonl.gz")
    assert corpora.content_hash() == before
    seen = {before}
    for name in ("documents.jsonl.gz", "documents.py", "corpora.py"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"#")
        seen.add(corpora.content_hash())
    for package in ("datasets", "pyarrow"):
        monkeypatch.setattr(corpora, "version", lambda name, other=package: "0" if name == other else version(name))
        seen.add(corpora.content_hash())
    assert len(seen) == 6


def test_news_labels_are_named_and_all_used(loaded):
    for split in SPLITS:
        feature = loaded["embedded/news"][split].features["label"]
        assert isinstance(feature, ClassLabel)
        assert feature.names == list(NEWS_LABELS)
        counts = Counter(loaded["embedded/news"][split]["label"])
        assert set(counts) == {0, 1, 2, 3}
        assert min(counts.values()) > 0.08 * sum(counts.values())


def test_news_rows_have_the_length_of_news_items(loaded):
    tokenizer = AutoTokenizer.from_pretrained(model_directory("embedded/gpt2"))
    lengths = sorted(len(ids) for ids in tokenizer(list(loaded["embedded/news"]["train"]["text"]))["input_ids"])
    assert 35 <= lengths[len(lengths) // 2] <= 70
    assert lengths[0] >= 10
    assert lengths[-1] <= 512


def test_every_answer_is_a_span_of_its_context(loaded):
    for split in SPLITS:
        ids = set()
        for row in loaded["embedded/qa"][split]:
            answers = row["answers"]
            assert len(answers["text"]) == len(answers["answer_start"]) == 1
            answer, start = answers["text"][0], answers["answer_start"][0]
            assert row["context"][start : start + len(answer)] == answer
            assert len(answer.split()) >= 2
            assert len(row["context"]) >= 150
            assert len(row["context"]) > len(answer) + 20
            assert re.fullmatch(r"(What|When) .+\?", row["question"])
            assert re.fullmatch(r"[0-9a-f]{24}", row["id"])
            ids.add(row["id"])
        assert len(ids) == len(loaded["embedded/qa"][split])


def test_the_answer_is_in_the_sentence_that_the_question_is_about(loaded):
    for row in loaded["embedded/qa"]["train"]:
        named = re.match(r"(?:What does|What is the module|What is|When does) ([\w.]+)", row["question"])
        before = row["context"][: row["answers"]["answer_start"][0]]
        assert f"{named[1].rstrip('.')}: " in before, row


def test_splits_share_no_document_and_no_text():
    for left in SPLITS:
        for right in SPLITS:
            if left >= right:
                continue
            names = [{d.name for d in documents() if d.split == split} for split in (left, right)]
            assert names[0].isdisjoint(names[1])
            pieces = [_pieces(split) for split in (left, right)]
            for name in pieces[0]:
                assert pieces[0][name].isdisjoint(pieces[1][name]), name


@functools.cache
def _pieces(split: str) -> dict[str, set[str]]:
    """Return text that must not occur in two splits. Copied docstrings may differ in name, case or punctuation."""
    plain = [
        {re.sub(r"\W+", " ", p).lower() for row in rows("embedded/articles", split) for p in row["text"].split("\n")},
        {re.sub(r"\W+", " ", row["text"].split(" - ", 1)[1]).lower() for row in rows("embedded/news", split)},
        {row["context"] for row in rows("embedded/qa", split)},
        {row["question"] for row in rows("embedded/qa", split)},
        {row["title"] for row in rows("embedded/qa", split)},
    ]
    names = ("paragraphs", "news", "contexts", "questions", "titles")
    return {name: {text for text in texts if text.strip()} for name, texts in zip(names, plain, strict=True)}


def test_two_processes_may_build_at_once(tmp_path):
    code = "from tutorial_lib.embedded import dataset_directory as d; print(d('embedded/news'))"
    environment = {**os.environ, "TUTORIAL_LIB_CACHE": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=240)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1
    built = Path(paths.pop().strip())
    assert sorted(p.name for p in built.iterdir()) == ["test.parquet", "train.parquet", "validation.parquet"]
    assert not [p for p in built.parent.iterdir() if p.name.startswith(".")], "an unfinished build was left behind"
    assert hashed_files([built]).items() <= ROWS.items()


def test_unknown_names_and_an_unusable_cache(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no embedded data set 'embedded/nws'.*embedded/news, embedded/articles"):
        dataset_directory("embedded/nws")
    with pytest.raises(ConfigError, match=r"no embedded model 'embedded/gpt3'.*embedded/gpt2, embedded/qwen2"):
        model_directory("embedded/gpt3")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUTORIAL_LIB_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="Set TUTORIAL_LIB_CACHE to a directory that can be written to"):
        dataset_directory("embedded/news")
