"""Checkpoints that are written while training goes on: the same ones, and none where something fails meanwhile."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.distributed import cases
from tests.distributed.comparing import Observed, assert_identical, compare
from tests.distributed.launching import observe
from tutorial_lib import checkpoint, launch
from tutorial_lib.records import RunDirectory


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [(ranks, kind) for ranks, kinds in cases.LATE.items() for kind in kinds if "without" not in kind],
)
def test_a_run_resumed_from_one_continues_bit_for_bit(observed, ranks, kind):
    """Its files were written when the step after it had changed the states."""
    run = observed(ranks, f"late.{kind}")
    assert_identical(run, observed(ranks, f"whole.{kind}"))
    assert run.directory.result()["resumed_from"] == cases.STOP - 1
    assert len(run.examples) == cases.END - cases.STOP + 1
    for path in run.directory.checkpoints.iterdir():
        checkpoint.verify(path)
    assert [saved["step"] for saved in run.directory.result()["saves"]] == [4, 6, 8]


def test_one_written_without_a_snapshot_is_seen(observed):
    differences = compare(
        observed(2, "late.zero1-without_snapshot"), observed(2, "whole.zero1"), tolerance=0.0, moments=0.0
    )
    assert {"loss", "parameters", "exp_avg"} <= differences.found.keys(), differences.found


@pytest.fixture(scope="module")
def failed(directory):
    """Runs of which rank 1 does not come through its second write: the errors."""
    errors = {}
    for name in cases.FATAL_IN_BACKGROUND:
        with pytest.raises(launch.WorkerError) as error:
            observe([settings(directory, name)])
        errors[name] = str(error.value)
    return errors


@pytest.fixture(scope="module")
def mended(directory, failed):
    """The same runs, started again after the cause is gone."""
    configs = []
    for name in cases.FATAL_IN_BACKGROUND:
        configs.append(settings(directory, name.replace("broken", "mended")))
        shutil.copytree(directory / "runs" / name, configs[-1].directory)
    observe(configs)
    return {config.run.name.replace("mended", "broken"): Observed.read(config) for config in configs}


def settings(directory, name):
    return cases.interruptible(directory, "zero1", "whole", name=name, checkpoint_every=2, async_save=True)


def test_a_threads_error_is_its_ranks_own(failed):
    first = failed["broken-disk_full_in_write"].splitlines()[0]
    assert first.startswith("Rank 1 of run 'broken-disk_full_in_write' failed with OSError: [Errno 27] File too large")
    assert re.search(r"/\.partial-step-00000004-[0-9a-f]{8}/engine/engine/", first)


def test_a_killed_writer_is_an_error(failed):
    assert "Rank 1 ended with exit code -9 and left no traceback: it was killed" in failed["broken-killed_in_write"]


@pytest.mark.parametrize("name", cases.FATAL_IN_BACKGROUND)
def test_the_checkpoint_before_stays_the_newest(failed, directory, name):
    run = RunDirectory(directory / "runs" / name)
    partial, saved = sorted(path.name for path in run.checkpoints.iterdir())
    assert partial.startswith(".partial-step-00000004-") and saved == "step-00000002"
    assert run.rows()[-1]["step"] > 4, "training had gone on"
    checkpoint.verify(checkpoint.latest(run))


@pytest.mark.parametrize("name", cases.FATAL_IN_BACKGROUND)
def test_and_the_run_goes_on_from_there_bit_for_bit(mended, observed, name):
    run = mended[name]
    assert run.directory.result()["resumed_from"] == 2
    assert_identical(run, observed(2, "whole.zero1"))
