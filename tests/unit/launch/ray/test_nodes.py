"""Cluster of two nodes for a lesson, with a program in place of Ray's processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tutorial_lib.config import Config
from tutorial_lib.launch.ray.nodes import TwoNodes


def test_a_cluster_that_was_closed_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lesson closes its nodes at the end of a cell, and its reader may run the cell again."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho 127.0.0.1:$$\ncat > /dev/null\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    nodes, addresses = TwoNodes(Config.create("cpu")), []
    for _ in range(2):
        with nodes, nodes.joined(), nodes.joined():  # twice: it joins the cluster that is there
            addresses.append(os.environ["RAY_ADDRESS"])
    assert len(set(addresses)) == 2
    assert "RAY_ADDRESS" not in os.environ
