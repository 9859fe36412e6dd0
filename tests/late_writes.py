"""Background writes made late on purpose: a missing snapshot must show."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tutorial_lib import checkpoint
from tutorial_lib.checkpoint import Writer
from tutorial_lib.records import RunDirectory

PATIENCE = 120
"""Seconds after which a test gives up waiting for a step."""


@contextmanager
def late_writes(then: Callable[[int], None] | None = None) -> Iterator[list[str | None]]:
    """Delay background writes until after the step that follows the save.

    By then training has changed weights, moments, random states and the position in the data.

    Args:
        then: called with the save's step just before each piece of work.

    Yields:
        The newest checkpoint that was visible before each piece of work was done.
    """
    run_job, newest = Writer._run, []

    def late(self: Any, job: Callable[..., Any], *given: Any) -> None:
        if self._thread is not None:
            root: Path = self.file_system._root
            run, step = RunDirectory(root.parents[1]), int(root.name.split("-")[2])
            deadline = time.monotonic() + PATIENCE
            while run.rows()[-1]["step"] <= step:
                assert time.monotonic() < deadline, "training waits for the files"
                time.sleep(0.01)
            visible = checkpoint.latest(run)
            newest.append(visible and visible.name)
            if then:
                then(step)
        run_job(self, job, *given)

    with mock.patch.object(Writer, "_run", late):
        yield newest


def without_snapshot() -> Any:
    """Patch the snapshot away, so that the files contain states that training changes meanwhile."""
    return mock.patch.object(Writer, "snapshot", lambda self, states: states)
