"""Failures under Ray: the worker that failed first, as a restart's record names it, and the error of a failed fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

from tutorial_lib.launch import Interrupted, WorkerError
from tutorial_lib.launch.ray.capacity import ResourcesMissing, StoppedWaiting
from tutorial_lib.launch.ray.train import _error, _first_failure
from tutorial_lib.records import RunDirectory

LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.80.0.2]:8092"
DIED = ActorDiedError()


def record(rank: int, type: str, message: str) -> dict[str, Any]:
    """Return a worker's error as it is on disk, with its time and traceback blank."""
    return {"rank": rank, "type": type, "message": message, "time": 0.0, "traceback": ""}


@pytest.mark.parametrize(
    ("written", "known_to_ray", "rank", "type", "message"),
    [
        (record(1, "ValueError", "its own"), {0: RuntimeError(LOST), 1: ValueError("its own")}, 1, "ValueError", "its"),
        (record(0, "RuntimeError", LOST), {0: RuntimeError(LOST), 1: DIED}, 1, "ActorDiedError", "The actor died"),
        (None, {0: RuntimeError(LOST), 1: DIED}, 1, "ActorDiedError", "The actor died"),
        (None, {1: RuntimeError("early"), 0: RuntimeError("too")}, 0, "RuntimeError", "too"),
        (
            record(0, "RuntimeError", LOST),
            {0: RuntimeError(LOST)},
            0,
            "RuntimeError",
            "it lost another rank, ",
        ),
    ],
    ids=["an error", "a lost worker", "nothing written", "only Ray knows", "before Ray knows of the lost worker"],
)
def test_the_worker_that_failed_first_is_recorded(
    written: dict[str, Any] | None, known_to_ray: dict[int, Exception], rank: int, type: str, message: str
) -> None:
    failed = _first_failure(written, known_to_ray)
    assert (failed["rank"], failed["type"]) == (rank, type)
    assert failed["message"].startswith(message)


@pytest.mark.parametrize(
    ("known_to_ray", "begin", "end"),
    [
        (
            {0: RuntimeError(LOST), 1: DIED},
            "Rank 1 of run 'run' left no error: it was killed, perhaps for lack of memory, or its node was lost. Run",
            "ActorDiedError: The actor died unexpectedly before finishing this task.",
        ),
        (
            {0: RuntimeError(LOST)},
            "Rank 0 of run 'run' failed with RuntimeError: it lost another rank, which was killed or",
            "Run the same command again, and it resumes: 'run' from step 0.",
        ),
    ],
    ids=["known to Ray", "before Ray knows"],
)
def test_a_lost_worker_is_named_rather_than_the_one_that_lost_it(
    tmp_path: Path, known_to_ray: dict[int, Exception], begin: str, end: str
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.write_error(0, RuntimeError(LOST))
    said = str(_error(WorkerGroupError("", known_to_ray), [run]))
    assert said.startswith(begin) and said.endswith(end)


def test_an_error_that_a_rank_wrote_is_shown_although_another_was_lost(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.write_error(0, ValueError("its own"))
    said = str(_error(WorkerGroupError("", {0: ValueError("its own"), 1: DIED}), [run]))
    assert said.startswith("Rank 0 of run 'run' failed with ValueError: its own\n")


@pytest.mark.parametrize(("missing", "raised"), [(StoppedWaiting, Interrupted), (ResourcesMissing, WorkerError)])
def test_a_run_that_waited_in_vain_says_where_it_would_resume(
    tmp_path: Path, missing: type[ResourcesMissing], raised: type[BaseException]
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.write_restarts([{"time": 0.0, "failed": {"rank": 1, "type": "OSError", "message": "its node is gone"}}])
    error = _error(ControllerError(missing("No room.")), [run])
    assert type(error) is raised
    assert str(error) == (
        "No room.\nIt had to restart because rank 1 failed: its node is gone\n"
        "Run the same command again, and it resumes: 'run' from step 0."
    )
