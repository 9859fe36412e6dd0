"""Starts the ranks of a benchmark as the local launcher starts those of a run."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

from tests.distributed.launching import ROOT
from tutorial_lib import launch
from tutorial_lib.config import Config


def run_on_ranks(module: str, configs: Sequence[Config]) -> list[launch.Run]:
    """Run the module's ``main`` on every rank, in place of the worker that trains; it leaves each run's result."""
    with mock.patch.dict("os.environ", PYTHONPATH=str(ROOT)):
        return launch.run_all(configs, worker=module)
