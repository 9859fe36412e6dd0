"""Checkpoints of a different model, tokenizer or version, which are refused before a process starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases.interruption import END
from tests.distributed.faults.outcomes import REFUSED
from tests.distributed.observing.comparing import Observed
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import CheckpointError
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.records import RunDirectory


@pytest.fixture
def config(uninterrupted: dict[str, Observed]) -> Config:
    """Return the configuration of a run that has ended and could be started again."""
    return uninterrupted["zero1"].config


@pytest.mark.fault("the checkpoint belongs to a different model of the same name", REFUSED)
def test_a_different_model(config: Config, directory: Path) -> None:
    with changed(directory / "gpt2-dropout" / "config.json", lambda content: content.update(n_head=2)):
        assert_refused(config, ConfigError, r"a model that differs.*n_head was 4, now 2.*another name")


@pytest.mark.fault("the checkpoint belongs to a different tokenizer", REFUSED)
def test_a_different_tokenizer(config: Config, directory: Path) -> None:
    """Exchange two tokens, so that the vocabulary has the same size but texts get different ids."""

    def exchange(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        one, other = list(vocabulary)[300:302]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    with changed(directory / "gpt2-dropout" / "tokenizer.json", exchange):
        assert_refused(config, ConfigError, r"another tokenizer.*another name")


@pytest.mark.fault("the checkpoint was written by a newer version", REFUSED)
def test_a_newer_version(config: Config) -> None:
    newest = checkpoint.directory_of(RunDirectory(config.directory), END)
    with changed(newest / "manifest.json", lambda content: content.update(format=99)):
        assert_refused(config, CheckpointError, r"written by a newer version, in format 99.*Update")


@contextmanager
def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    before = path.read_text()
    content = json.loads(before)
    change(content)
    path.write_text(json.dumps(content))
    try:
        yield
    finally:
        path.write_text(before)


def assert_refused(config: Config, error_type: type[Exception], message: str) -> None:
    logs = {path: path.stat().st_mtime_ns for path in config.directory.joinpath("logs").iterdir()}
    with pytest.raises(error_type, match=message):
        launch.run(config)
    assert {path: path.stat().st_mtime_ns for path in config.directory.joinpath("logs").iterdir()} == logs
    assert [row["step"] for row in RunDirectory(config.directory).rows()] == list(range(1, END + 1))
