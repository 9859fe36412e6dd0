"""Connectivity check between ranks on different nodes, made before gloo connects all ranks.

Ranks that use a wrong network interface still find each other, because all go to one rendezvous address. Only then does
gloo connect each pair of ranks. If that fails, one rank of the pair fails at once and blames its own interface, while
the other waits until a collective's timeout. So each rank first tries to reach its neighbours, for a few seconds, and
all ranks learn which connection failed.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from ipaddress import ip_address

from torch.distributed import Store

from tutorial_lib.launch.environment import addresses

CONNECT_SECONDS = 10.0
"""Seconds to wait for a connection to a neighbour."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Address of a rank, and how it was chosen.

    Attributes:
        node: host name of its node.
        address: address at which it listens, as gloo will later.
        port: its port for this check.
        chosen: how the address was chosen.
        interfaces: the node's network interfaces with their addresses.
    """

    node: str
    address: str
    port: int
    chosen: str
    interfaces: str


def unreachable_rank(store: Store, rank: int, num_ranks: int) -> str:
    """Describe a rank that its neighbour cannot reach, or return an empty string if there is none. Collective.

    The ranks of a node are consecutive, so some rank on each node has a neighbour on another. All
    ranks return the same text.
    """
    with _listen() as server:
        own = _place(server)
        store.set(f"reach/{rank}", json.dumps(asdict(own)))
        for peer in {(rank - 1) % num_ranks, (rank + 1) % num_ranks}:
            if problem := _problem(rank, own, peer, _Place(**json.loads(store.get(f"reach/{peer}")))):
                store.set("reach/problem", problem)
        if store.add("reach/checked", 1) == num_ranks:
            store.set("reach/outcome", store.get("reach/problem").decode() if store.check(["reach/problem"]) else "")
        return str(store.get("reach/outcome").decode())


def _listen() -> socket.socket:
    """Listen where gloo would: on the chosen interface, at the address of the host name, or on the loopback."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    for host in (*(address for name, address in addresses() if name in chosen), socket.gethostname()):
        try:
            family, *_, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            return socket.create_server(where[:2], family=family)
        except OSError:
            continue
    return socket.create_server(("127.0.0.1", 0))


def _place(server: socket.socket) -> _Place:
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    address, port = server.getsockname()[:2]
    return _Place(
        node=socket.gethostname(),
        address=address,
        port=port,
        chosen=f"GLOO_SOCKET_IFNAME={chosen}" if chosen else "its host name",
        interfaces=", ".join(f"{name} ({address})" for name, address in addresses()),
    )


def _problem(rank: int, own: _Place, peer: int, place: _Place) -> str:
    """Return why a rank cannot connect to its peer, or an empty string if it can or need not connect.

    As in gloo, the rank with the higher address connects and the other one listens. The reverse may be impossible.
    """
    if ip_address(own.address).packed < ip_address(place.address).packed:
        return ""
    try:
        socket.create_connection((place.address, place.port), timeout=CONNECT_SECONDS).close()
        return ""
    except OSError as error:
        why = error.strerror or f"no answer within {CONNECT_SECONDS:g} s"
    return (
        f"Rank {rank}, on {own.node}, cannot reach rank {peer}, on {place.node}, at {place.address}, the address of "
        f"{place.chosen}: {why}. On {place.node}, set GLOO_SOCKET_IFNAME to the interface of the network "
        f"between the nodes; it has {place.interfaces}."
    )
