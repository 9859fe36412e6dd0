"""Record of a restart: the worker that failed first and its error, from the workers' records and from Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from tutorial_lib.launch.ray.train import _first_failure

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
