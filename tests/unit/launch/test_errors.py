"""Errors of torchrun's ranks, each of which names the rank that failed first, and the cause."""

from __future__ import annotations

import json
import threading

import pytest

from tutorial_lib.launch import errors
from tutorial_lib.records import RunDirectory

LOST = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def raised(error: Exception) -> Exception:
    """Return an error with a traceback."""
    try:
        raise error
    except Exception as error:
        return error


def test_a_rank_with_an_error_of_its_own_shows_its_traceback(run: RunDirectory) -> None:
    run.write_error(1, raised(ValueError("of this rank")))
    said = str(errors.error_of_joined_rank(run, rank=1, num_ranks=2))
    assert said.startswith("Rank 1 of run 'run' failed with ValueError: of this rank\n\nTraceback")
    assert "raise error" in said


def test_a_rank_names_a_lost_peer_even_if_it_learns_of_it_late(run: RunDirectory) -> None:
    """The clock of the other node may be ahead, and its record may arrive late."""
    run.write_error(0, LOST)

    def arrive() -> None:
        run.write_error(1, raised(ValueError("the cause")))
        path = run.logs / "rank-001.error.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "node": "node2"}))

    late = threading.Timer(0.3, arrive)
    late.start()
    said = str(errors.error_of_joined_rank(run, rank=0, num_ranks=2))
    late.join()
    assert said.startswith("Rank 0 of run 'run' ends because rank 1, on ")
    assert "failed with ValueError: the cause\nThe output of that rank has the traceback." in said


@pytest.mark.parametrize(
    ("wrote", "num_ranks", "why"),
    [
        ([0], 2, "Rank 1 left no error: it was killed, perhaps for lack of memory, or its node was lost. Run the same"),
        ([0, 3], 4, "Ranks 1, 2 left no error: at least one of them was killed"),
        ([0], 64, "Ranks 1, 2, 3, 4, 5, 6, 7, 8 and 55 more left no error"),
        ([0, 1], 2, "So did all the others: the network between their nodes may have failed."),
    ],
    ids=["one is silent", "two are silent", "many are silent", "none is silent"],
)
def test_a_rank_that_left_no_error_is_named(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, wrote: list[int], num_ranks: int, why: str
) -> None:
    monkeypatch.setattr(errors, "_RECORD_SECONDS", 0.2)
    for rank in wrote:
        run.write_error(rank, LOST)
    said = str(errors.error_of_joined_rank(run, rank=0, num_ranks=num_ranks))
    assert said.startswith("Rank 0 of run 'run' lost the connection to another rank, or got no answer. ")
    assert why in said and said.endswith(f"\nRuntimeError: {LOST}")
