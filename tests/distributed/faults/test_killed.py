"""Ranks that fail or are killed: in a pass, in the update, and at each stage of a save."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.faults.outcomes import RESUMES
from tutorial_lib.records import RunDirectory


@pytest.mark.fault("SIGKILL of a rank in the forward pass (ZeRO-3)", RESUMES)
def test_killed_in_the_forward_pass(assert_recovers_from_a_kill: Callable[..., None]) -> None:
    assert_recovers_from_a_kill("killed.in_forward", rank=1)


@pytest.mark.fault("SIGKILL of a rank in the backward pass (ZeRO-1)", RESUMES)
def test_killed_in_the_backward_pass(assert_recovers_from_a_kill: Callable[..., None]) -> None:
    assert_recovers_from_a_kill("killed.in_backward", rank=1)


@pytest.mark.fault("SIGKILL of a rank within the optimizer step (FSDP2)", RESUMES)
def test_killed_within_the_optimizer_step(assert_recovers_from_a_kill: Callable[..., None]) -> None:
    assert_recovers_from_a_kill("killed.in_update", rank=1)


@pytest.mark.fault("SIGKILL of a rank while it saves", RESUMES)
def test_killed_while_it_saves(assert_recovers_from_a_kill: Callable[..., None]) -> None:
    assert_recovers_from_a_kill("killed.in_save", rank=1)


@pytest.mark.fault(
    "SIGKILL of rank 0 with a checkpoint complete and not yet renamed (ZeRO-3)",
    "stops with an error that names the rank; the same command renames the checkpoint and resumes from it",
)
def test_killed_before_a_complete_checkpoint_is_renamed(assert_recovers_from_a_kill: Callable[..., None]) -> None:
    assert_recovers_from_a_kill("killed.in_publish", rank=0, resumes_from=4)


@pytest.mark.fault("SIGKILL of rank 0 while it deletes an old checkpoint (`keep_last`)", RESUMES)
def test_killed_while_it_deletes_an_old_checkpoint(
    assert_recovers_from_a_kill: Callable[..., None], directory: Path
) -> None:
    assert_recovers_from_a_kill("killed.in_prune", rank=0, intact=[4], resumes_from=4, kept=[8])
    left = directory / "runs/killed.in_prune/checkpoints"
    assert [path.name[:-9] for path in left.glob(".*")] == [".deleting-step-00000002"], "it was killed halfway"


@pytest.mark.fault("SIGKILL of rank 0 with half a row of `metrics.jsonl` written", RESUMES)
def test_killed_with_half_a_row_written(assert_recovers_from_a_kill: Callable[..., None], directory: Path) -> None:
    assert_recovers_from_a_kill("killed.in_report", rank=0)
    half = (directory / "runs/killed.in_report/metrics.jsonl").read_text()
    assert half.count("\n") == 3 and not half.endswith("\n")


@pytest.mark.fault("an exception in one rank's save", RESUMES)
def test_an_exception_in_a_save(assert_recovers: Callable[..., str]) -> None:
    said = assert_recovers("storage.save_raises")
    assert said.startswith("Rank 1 of run 'storage.save_raises' failed with OSError: the disk is full\n")
    assert 'raise OSError("the disk is full")' in said
    assert "rank-001.log" in said


# ------------------------------------------------------------------- while a thread writes files and training continues


@pytest.mark.fault("SIGKILL of a rank halfway through writing a file in the background (`async_save`)", RESUMES)
def test_killed_while_it_writes_in_the_background(
    assert_recovers_from_a_kill: Callable[..., None], directory: Path
) -> None:
    assert_recovers_from_a_kill("killed.in_write", rank=1)
    left = RunDirectory(directory / "runs/killed.in_write")
    assert_trained_on_during_the_save(left)
    half, full = (
        next(left.checkpoints.glob(f"{step}*/engine/engine/*zero_pp_rank_1_*optim_states.pt")).stat().st_size
        for step in (".partial-step-00000004", "step-00000002")
    )
    assert 0 < half < full


@pytest.mark.fault("a rank hits the limit on file sizes while it writes in the background (`async_save`)", RESUMES)
def test_a_limit_on_file_sizes_in_the_background(assert_recovers: Callable[..., str], directory: Path) -> None:
    said = assert_recovers("storage.limit_in_write")
    first = said.splitlines()[0]
    assert first.startswith("Rank 1 of run 'storage.limit_in_write' failed with OSError: [Errno 27] File too large")
    assert re.search(r"/\.partial-step-00000004-[0-9a-f]{8}/engine/engine/", first)
    assert_trained_on_during_the_save(RunDirectory(directory / "runs/storage.limit_in_write"))


def assert_trained_on_during_the_save(left: RunDirectory) -> None:
    partial, saved = sorted(path.name for path in left.checkpoints.iterdir())
    assert partial.startswith(".partial-step-00000004-") and saved == "step-00000002"
    assert left.rows()[-1]["step"] > 4
