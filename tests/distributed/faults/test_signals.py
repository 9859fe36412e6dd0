"""SIGTERM to a run, and SIGKILL to its launcher."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import crashing
from tests.distributed.faults.checks import assert_ends_like
from tests.distributed.observing.comparing import Observed


@pytest.mark.fault(
    "SIGTERM, as a scheduler sends it before a job's time limit", "saves, exits with 75; the same command resumes"
)
def test_sigterm(signalled: dict[str, Any], uninterrupted: dict[str, Observed]) -> None:
    code, said, result = signalled["stopped"]
    assert (code, said, result["status"]) == (75, "", "stopped")
    assert 0 < result["step"] < signalled["killed"]["step"], "the next start went on"
    assert_ends_like(signalled, uninterrupted["long"])


@pytest.mark.fault("SIGKILL of the launching process", "the ranks save and stop; the same command resumes")
def test_sigkill_of_the_launching_process(signalled: dict[str, Any], uninterrupted: dict[str, Observed]) -> None:
    assert not signalled["alive"], "workers outlive the process that started them"
    assert signalled["killed"]["status"] == "stopped"
    assert signalled["ended"][2]["resumed_from"] == signalled["killed"]["step"] < crashing.LONG["steps"]
    assert_ends_like(signalled, uninterrupted["long"])
