"""``--launcher none`` joins the processes that torchrun started, with the same numbers as the local launcher."""

from __future__ import annotations

import re
import socket
from datetime import timedelta

import pytest

from tests.distributed.cases import crashing, interruption, small_runs
from tests.distributed.cases.equivalence import MATRIX
from tests.distributed.cases.interruption import STOP
from tests.support.commands import train_command
from tutorial_lib import cli
from tutorial_lib.launch import torchrun
from tutorial_lib.launch.environment import RENDEZVOUS
from tutorial_lib.records import RunDirectory

KINDS = [("zero1", (STOP, None)), *([("1x2-zero0", (None,)), ("fsdp-full", (None,))] if MATRIX else [])]
"""Kinds of runs, with the step after which each start stops, if any. Ranks join in the same way for all of them."""


@pytest.mark.parametrize(("kind", "stops"), KINDS)
def test_a_run_started_by_torchrun_matches_local_processes(observed, directory, shell, kind, stops):
    """torchrun treats 75 as a failure, so the exit code of a run that stops is 0, and its result says ``stopped``."""
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


@pytest.mark.fault(
    "an exception in a rank under torchrun", "the rank shows its traceback; the other ranks name it and its error"
)
def test_the_error_of_a_rank_ends_the_others_and_shows_its_traceback(directory, shell):
    """On two nodes, ``tests/cluster/test_torchrun.py`` kills a rank and, with ``make matrix``, lets one raise."""
    config = crashing.saving(directory, "zero1", "torchrun-fails", launcher="none")
    program = ["tests.distributed.workers.with_fault", "storage.save_raises", *train_command(config)[1:]]
    shell.start(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *program])
    assert shell.exit_code() == 1
    said = (shell.scratch / "stderr").read_text()
    assert "error: Rank 1 of run 'torchrun-fails' failed with OSError: the disk is full\n\nTraceback" in said
    assert re.search(r"Root Cause \(first observed failure\):\n.*\n.*\n.*\n  rank +: 1 ", said)


@pytest.mark.fault(
    "`RANK=0` exported by hand",
    "refused with exit code 2 and a list of the missing variables; with all of them set, it waits 300 s for the other "
    "ranks, and says to unset them",
)
def test_torchrun_variables_exported_by_hand(directory, monkeypatch, capsys):
    for name in RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    config = small_runs.config(directory, name="by-hand", launcher="none", engine="fsdp")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(train_command(config)[1:]) == cli.BAD_CONFIGURATION
    assert "RANK is set without LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT." in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    for name, value in zip(RENDEZVOUS[1:], ("0", "2", "127.0.0.1", port), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torchrun, "JOIN_TIMEOUT", timedelta(seconds=1))
    assert cli.main(train_command(config.override(dp=2))[1:]) == cli.FAILED
    said = capsys.readouterr().err
    assert "not all of the others arrived" in said and "RANK and WORLD_SIZE were exported by hand, unset them" in said
