"""Toy data whose tokens reveal their row, and caches that only these tests use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tutorial_lib.config import Config


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTORIAL_LIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per ASCII character and, like GPT-2's, an EOS but no padding token."""
    vocab = {character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["<eos>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="session")
def toy_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Return a function that writes a data set with n training rows ``00007:xxx`` and 3 * n evaluation rows."""

    def make(num_rows: int) -> str:
        directory = base / str(num_rows)
        if not directory.exists():
            for split, rows in (("train", num_rows), ("validation", 3 * num_rows)):
                write_jsonl(directory / f"{split}.jsonl", [{"text": toy_text(i)} for i in range(rows)])
        return str(directory)

    base: Path = tmp_path_factory.mktemp("toy")
    return make


def toy_text(number: int) -> str:
    return f"{number:05d}:" + "x" * (number * 7 % 19)


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def toy_config(toy_directory: Callable[[int], str]) -> Callable[..., Config]:
    """Return a function that makes a configuration for toy rows of up to 25 tokens."""

    def make(num_rows: int, **flat: object) -> Config:
        settings = {"dataset": toy_directory(num_rows), "seq_length": 32, "dp": 1, "epochs": 5}
        return Config.create(**(settings | flat))

    return make
