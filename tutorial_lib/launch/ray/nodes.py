"""Ray cluster of two nodes on one machine, one of which can be lost: for lessons without a cluster.

Each node is a raylet with its own CPU slots, like one from ``ray start``, so Ray treats the second one like another
machine. A SIGKILL to all its processes simulates its loss. The nodes are started from a separate process
(``python -m tutorial_lib.launch.ray.nodes CPUS``), because Ray keeps one cluster's token per process and a notebook may
have used another cluster before.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from types import TracebackType
from typing import Any

NOTICE_A_LOST_NODE = {
    "RAY_AUTH_MODE": "token",
    # A node counts as dead when it has not answered for about 1.5 s. By default that takes 15 s and more.
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # Ray Train starts its own worker processes; those that Ray starts in advance would only take memory.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of a cluster that notices a lost node within seconds."""


class TwoNodes:
    """A running Ray cluster of two nodes, as a context manager. Its processes end with the block, or with this process.

    Attributes:
        environment: variables for a process that connects to the cluster: ``RAY_ADDRESS``, a token, and settings.

    Args:
        cpus: slots for workers on each node.

    Raises:
        RuntimeError: Ray did not start; the message is Ray's.
    """

    def __init__(self, cpus: int = 1) -> None:
        self.environment = {**NOTICE_A_LOST_NODE, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._owner = subprocess.Popen(
            [sys.executable, "-m", "tutorial_lib.launch.ray.nodes", str(cpus)],
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.environment["RAY_ADDRESS"] = self._answer()

    def lose_one(self) -> None:
        """Kill the second node and all workers on it, as a power failure would."""
        assert self._owner.stdin is not None
        print("lose", file=self._owner.stdin, flush=True)
        self._answer()

    def close(self) -> None:
        """End all processes of the cluster."""
        self._owner.communicate()

    def _answer(self) -> str:
        assert self._owner.stdout is not None
        if line := self._owner.stdout.readline().strip():
            return line
        _, errors = self._owner.communicate()
        raise RuntimeError(f"Ray did not start two nodes on this machine:\n{errors[-2000:]}")

    def __enter__(self) -> TwoNodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(cpus: int) -> None:
    """Start two nodes and print their address. A line of input kills the second one; the end of the input ends both."""
    from ray.cluster_utils import Cluster

    slots: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**slots, "include_dashboard": False})
    try:
        second = cluster.add_node(**slots)
        print(cluster.address, flush=True)
        for _ in sys.stdin:
            cluster.remove_node(second, allow_graceful=False)
            print("lost", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
