"""Ranks of a benchmark, started like the ranks of a run by the local launcher."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

from tests.support.launching import ROOT
from tutorial_lib import launch
from tutorial_lib.config import Config


def run_on_ranks(module: str, configs: Sequence[Config]) -> list[launch.Run]:
    """Run the module's ``main``, which writes each run's result, on every rank in place of the training worker."""
    with mock.patch.dict("os.environ", PYTHONPATH=str(ROOT)):
        return launch.run_all(configs, worker=module)
