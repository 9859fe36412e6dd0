"""Background writes made late on purpose: a missing snapshot must show."""

from __future__ import annotations

import time
import weakref
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
    create, submit = Writer.__init__, Writer.submit
    roots: weakref.WeakKeyDictionary[Writer, Path] = weakref.WeakKeyDictionary()
    newest: list[str | None] = []

    def creating(self: Writer, root: Path, stager: Any = None) -> None:
        create(self, root, stager)
        if stager is not None:
            roots[self] = root

    def submitting(self: Writer, job: Callable[..., Any], *given: Any) -> None:
        def late(*given: Any) -> None:
            root = roots[self]
            run, step = RunDirectory(root.parents[1]), int(root.name.split("-")[2])
            deadline = time.monotonic() + PATIENCE
            while run.rows()[-1]["step"] <= step:
                assert time.monotonic() < deadline, "training waits for the files"
                time.sleep(0.01)
            visible = checkpoint.latest(run)
            newest.append(visible and visible.name)
            if then:
                then(step)
            job(*given)

        submit(self, late if self in roots else job, *given)

    with mock.patch.multiple(Writer, __init__=creating, submit=submitting):
        yield newest


def without_snapshot() -> Any:
    """Patch the snapshot away, so that the files contain states that training changes meanwhile."""
    return mock.patch.object(Writer, "snapshot", lambda self, states: states)
