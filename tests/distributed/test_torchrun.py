"""``--launcher none`` joins the processes that torchrun started, with the same numbers as the local launcher."""

from __future__ import annotations

import pytest

from tests.distributed.cases import interruption
from tests.distributed.cases.equivalence import MATRIX
from tests.distributed.cases.interruption import STOP
from tests.support.launching import train_command
from tutorial_lib.records import RunDirectory

KINDS = [("zero1", (STOP, None)), *([("1x2-zero0", (None,)), ("fsdp-full", (None,))] if MATRIX else [])]
"""Kinds of runs, with the steps at which each start ends. How ranks join does not depend on the engine."""


@pytest.mark.parametrize(("kind", "stops"), KINDS)
def test_a_run_started_by_torchrun_matches_local_processes(observed, directory, shell, kind, stops):
    """Stop it once. torchrun treats 75 as a failure, so the exit code is 0, and the result says that steps are left."""
    local = observed(2, f"uninterrupted.{kind}")
    for stop in stops:
        config = interruption.uninterrupted(
            directory, kind, name=f"torchrun-{kind}", launcher="none", stop_after=stop, checkpoint_every=0
        )
        shell.start(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *train_command(config)])
        assert shell.exit_code() == 0, (shell.scratch / "stderr").read_text()
        assert shell.result()["status"] == ("stopped" if stop else "completed")
    for key in ("step", "loss", "grad_norm", "tokens", "epoch", "lr"):
        assert [row[key] for row in RunDirectory(config.directory).rows()] == [row[key] for row in local.rows], key
