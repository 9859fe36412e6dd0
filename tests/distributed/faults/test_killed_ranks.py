"""Ranks that are killed in a pass, in the update, and at each stage of a save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.faults.checks import assert_training_continued_during_the_save
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


# ------------------------------------------------------------------- while a thread writes files and training continues


@pytest.mark.fault("SIGKILL of a rank halfway through writing a file in the background (`async_save`)", RESUMES)
def test_killed_while_it_writes_in_the_background(
    assert_recovers_from_a_kill: Callable[..., None], directory: Path
) -> None:
    assert_recovers_from_a_kill("killed.in_write", rank=1)
    left = RunDirectory(directory / "runs/killed.in_write")
    assert_training_continued_during_the_save(left)
    half, full = (
        next(left.checkpoints.glob(f"{step}*/engine/engine/*zero_pp_rank_1_*optim_states.pt")).stat().st_size
        for step in (".partial-step-00000004", "step-00000002")
    )
    assert 0 < half < full
