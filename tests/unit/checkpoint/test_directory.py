"""Checkpoint directories that are read while their run trains, and so deletes old ones (``keep_last``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.torch_runs import make_checkpoint, steps
from tutorial_lib import checkpoint
from tutorial_lib.checkpoint import directory, inspector, manifest
from tutorial_lib.cli import main
from tutorial_lib.records import RunDirectory

TooLate = Callable[[Callable[..., Any]], Callable[..., Any]]


@pytest.fixture
def too_late(run: RunDirectory) -> TooLate:
    """Return a wrapper for functions that read the run's only checkpoint: it is replaced just before, up to step 3."""
    make_checkpoint(run, 1)

    def wrap(read: Callable[..., Any]) -> Callable[..., Any]:
        def read_too_late(path: Path, *given: Any) -> Any:
            if path.exists() and (step := directory.step_of(path)) < 3:
                make_checkpoint(run, step + 1)
                directory.delete(path)
            return read(path, *given)

        return read_too_late

    return wrap


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_damaged(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, too_late: TooLate
) -> None:
    monkeypatch.setattr(directory, "damage", too_late(directory.damage))
    assert directory.newest_intact(run) == (checkpoint.directory_of(run, 3), [])


def test_an_export_takes_a_newer_checkpoint_instead(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, too_late: TooLate, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(path: Path, target: Path, max_shard_size: str) -> Path:
        manifest.verify(path)
        return target

    monkeypatch.setattr(checkpoint, "export", too_late(export))
    assert main(["export", str(run.path), "exported"]) == 0
    assert capsys.readouterr().out == f"{checkpoint.directory_of(run, 3)} -> exported\n"


def test_an_inspection_shows_a_newer_checkpoint_instead(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, too_late: TooLate
) -> None:
    monkeypatch.setattr(inspector, "read_manifest", too_late(inspector.read_manifest))
    report = inspector.inspect(run.path)
    assert (report["newest"], [row["checkpoint"] for row in report["checkpoints"]]) == (steps(3)[0], steps(3))


def test_a_run_that_deletes_too_fast_is_named(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, too_late: TooLate
) -> None:
    monkeypatch.setattr(directory, "ATTEMPTS", 2)
    monkeypatch.setattr(directory, "damage", too_late(directory.damage))
    with pytest.raises(checkpoint.CheckpointError, match=r"^Run 'run' is training, and deleted 2 checkpoints while"):
        directory.locate(run.path)
