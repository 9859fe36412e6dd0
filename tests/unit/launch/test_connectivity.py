"""Reachability check: threads stand in for ranks, and addresses of this machine for addresses of nodes."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from torch.distributed import HashStore

from tutorial_lib.launch import connectivity


@pytest.fixture(autouse=True)
def without_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def outcomes(num_ranks: int) -> set[str]:
    """Return the ranks' distinct findings."""
    store = HashStore()
    with ThreadPoolExecutor(num_ranks) as pool:
        return set(pool.map(lambda rank: connectivity.unreachable_rank(store, rank, num_ranks), range(num_ranks)))


def test_ranks_that_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcomes(4) == {""}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert outcomes(2) == {""}


def test_a_rank_that_cannot_be_reached_is_named_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank tells the others a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nothing = closed.getsockname()[1]
    wrong = [{"node": "node2", "address": "127.0.0.1", "port": nothing}]
    place = connectivity._place
    monkeypatch.setattr(connectivity, "_place", lambda server: replace(place(server), **(wrong.pop() if wrong else {})))
    began = time.monotonic()
    (said,) = outcomes(3)
    assert time.monotonic() - began < 5
    assert ", on node2, at 127.0.0.1, the address of its host name: Connection refused. On node2, set GLOO_" in said
    assert "lo (127.0.0.1)" in said


def test_a_rank_that_only_connects_itself_need_not_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """In gloo, the rank with the higher address connects, so others need not reach that address."""
    place, private = connectivity._place, [{"address": "203.0.113.1"}]
    monkeypatch.setattr(connectivity, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(
        connectivity, "_place", lambda server: replace(place(server), **(private.pop() if private else {}))
    )
    assert outcomes(2) == {""}


def test_an_address_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue of connections drops further ones, as a firewall does."""
    monkeypatch.setattr(connectivity, "CONNECT_SECONDS", 0.5)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        with socket.create_connection(server.getsockname()):
            place = connectivity._place
            full = {"address": "127.0.0.1", "port": server.getsockname()[1]}
            monkeypatch.setattr(connectivity, "_place", lambda own: replace(place(own), **full))
            (said,) = outcomes(1)
    assert "no answer within 0.5 s" in said
