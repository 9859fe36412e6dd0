"""Launches with the observing worker in place of the library's; everything else is ``tutorial_lib.launch``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tutorial_lib import launch
from tutorial_lib.config import Config
from tutorial_lib.launch import local

ROOT = Path(__file__).resolve().parents[2]
_THEIRS = "tutorial_lib.launch.worker"


def observe(configs: Sequence[Config], worker: str = "tests.distributed.worker") -> list[launch.Run]:
    """``launch.run_all`` with processes that leave observations: a module with the arguments of the library's."""
    start_processes = local.start_processes

    def start(*, args: dict[int, Sequence[str]], **options: Any) -> Any:
        assert all(_THEIRS in arguments for arguments in args.values())
        ours = {rank: tuple(worker if a == _THEIRS else a for a in arguments) for rank, arguments in args.items()}
        return start_processes(args=ours, **options)

    with pytest.MonkeyPatch.context() as patch, mock.patch.object(local, "start_processes", start):
        patch.setenv("PYTHONPATH", str(ROOT), prepend=":")
        return launch.run_all(configs)
