"""Damaged checkpoints: a run resumes from the newest intact one, or is refused if there is none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.cases import crashing
from tests.distributed.faults.checks import assert_all_intact
from tests.distributed.faults.outcomes import FALLS_BACK
from tests.distributed.observing.comparing import Observed, assert_identical
from tests.support.commands import train_command
from tests.support.damaged_files import shard
from tests.support.launching import Shell


@pytest.fixture
def assert_falls_back(uninterrupted: dict[str, Observed], recovered: dict[str, Observed]) -> Callable[..., None]:
    """Return a function that checks which checkpoints a run skipped and why, and that it ends as if uninterrupted."""

    def check(name: str, left_out: list[int], why: str) -> None:
        run = recovered[name]
        result = run.directory.result()
        assert result["resumed_from"] == min(left_out) - 2
        assert [each["checkpoint"] for each in result["left_out"]] == [f"step-{step:08d}" for step in left_out]
        for each in result["left_out"]:
            assert re.search(why, each["why"]), each
            assert f"Not resumed from {each['checkpoint']}: {each['why']}" in run.directory.log_file(0).read_text()
        assert_identical(run, uninterrupted["zero1"])
        assert assert_all_intact(run.directory) == [2, 4, 6, 8], "damaged checkpoints are replaced"

    return check


@pytest.mark.fault("the newest checkpoint has a file that is cut short", FALLS_BACK)
def test_a_file_that_is_cut_short(assert_falls_back: Callable[..., None]) -> None:
    assert_falls_back("cut_short", [8], r"rank-001\.pt has \d+ bytes, but \d+ were written\.")


@pytest.mark.fault("the newest checkpoint has one bit flipped in a rank's shard", FALLS_BACK)
def test_a_flipped_bit(assert_falls_back: Callable[..., None]) -> None:
    assert_falls_back("flip_a_bit", [8], r"zero_pp_rank_1_\S+optim_states\.pt was altered after it was written")


@pytest.mark.fault("the newest checkpoint lacks a rank's file", FALLS_BACK)
def test_a_missing_file(assert_falls_back: Callable[..., None]) -> None:
    assert_falls_back("remove_a_file", [8], r"zero_pp_rank_1_\S+optim_states\.pt is missing from the checkpoint\.")


@pytest.mark.fault("the two newest checkpoints have lost their manifest", FALLS_BACK)
def test_two_missing_manifests(assert_falls_back: Callable[..., None]) -> None:
    assert_falls_back("remove_two_manifests", [8, 6], r"step-0000000[68] has no manifest\.json")


@pytest.mark.fault(
    "no checkpoint is intact", "refused, with the reason for each one; it never silently starts from step 0"
)
def test_no_intact_checkpoint(uninterrupted: dict[str, Observed], directory: Path, shell: Shell) -> None:
    """Only ranks that read the files find this damage. Every rank refuses, and the first error is printed."""
    config = crashing.saving(directory, "zero1", "none-intact")
    shutil.copytree(uninterrupted["zero1"].directory.path, config.directory)
    for step in (2, 4, 6, 8):
        saved = shard(config.directory, step, rank=1)
        saved.write_bytes(saved.read_bytes()[:-1] + b"?")
    before = (config.directory / "metrics.jsonl").read_text()
    shell.start(train_command(config))
    assert shell.exit_code() == 1
    first = (shell.scratch / "stderr").read_text().splitlines()[0]
    assert first.startswith("error: Rank ") and "failed with CheckpointError" in first
    assert "none of them is intact" in first
    assert len(set(re.findall(r"/step-(\d+)/\S+ was altered", first))) == 4
    assert (shell.scratch / "stdout").read_text() == ""
    assert (config.directory / "metrics.jsonl").read_text() == before
