"""Starts the ranks of a benchmark as the local launcher starts those of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

from tests.distributed.launching import ROOT
from tutorial_lib import launch
from tutorial_lib.config import Config
from tutorial_lib.launch import local

_WORKER = "tutorial_lib.launch.worker"


def run_on_ranks(module: str, configs: Sequence[Config]) -> list[launch.Run]:
    """``python -m MODULE`` on every rank, in place of the worker that trains; it leaves each run's result."""
    start_processes = local.start_processes

    def start(*, args: dict[int, tuple[str, ...]], **options: Any) -> Any:
        ours = {rank: tuple(module if a == _WORKER else a for a in given) for rank, given in args.items()}
        return start_processes(args=ours, **options)

    path = mock.patch.dict("os.environ", PYTHONPATH=str(ROOT))
    with path, mock.patch.object(local, "start_processes", start):
        return launch.run_all(configs)
