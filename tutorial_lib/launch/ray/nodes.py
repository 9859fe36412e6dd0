"""Ray cluster of two nodes on one machine, so that a lesson can lose a node without a real cluster.

Each node is a raylet with its own CPU slots, like one from ``ray start``, so Ray treats the second one like another
machine. A SIGKILL to the raylet simulates the loss of its node; the workers there end within a second. A separate
process, ``python -m tutorial_lib.launch.ray.nodes CPUS CONFIG``, starts the nodes while a notebook does other work. It
also runs the warm server from which the nodes' workers are forked.
"""

from __future__ import annotations

import importlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from tutorial_lib.config import Config
from tutorial_lib.launch.ray.cluster import ON_ONE_MACHINE, SETTINGS, forked_workers

NOTICE_A_LOST_NODE = {
    "RAY_AUTH_MODE": "token",
    # A node counts as dead when it has not answered for about 1.5 s. By default that takes 15 s or more.
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
    """A Ray cluster of two nodes that starts in the background. Its processes end with the block, or with this process.

    Args:
        config: a run that will use the cluster. Its device decides what workers load.
        cpus: slots for workers on each node.
    """

    def __init__(self, config: Config, cpus: int = 1) -> None:
        self._environment = {
            **SETTINGS,
            **NOTICE_A_LOST_NODE,
            **ON_ONE_MACHINE,
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        self._command = [sys.executable, "-m", "tutorial_lib.launch.ray.nodes", str(cpus), config.to_json()]
        self._start()

    def _start(self) -> None:
        self._environment.pop("RAY_ADDRESS", None)
        self._owner = subprocess.Popen(
            self._command,
            env={**os.environ, **self._environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # interrupting a notebook cell signals its whole process group
        )

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Wait for the cluster, and make Ray join it whenever code in the block starts Ray.

        If it has been closed, as by a cell that is run again, it starts again.

        Raises:
            RuntimeError: Ray did not start; the message is Ray's.
        """
        if self._has_ended():
            self._start()
        if "RAY_ADDRESS" not in self._environment:
            self._environment["RAY_ADDRESS"] = self._answer()
        with ExitStack() as left, mock.patch.dict(os.environ, self._environment):
            from ray._private import worker

            left.callback(_read_variables_again)
            _read_variables_again()
            # Without this, Ray would print the last 20 lines of the lost node's log.
            with mock.patch.object(worker, "print_to_stdstream"):
                yield

    def lose_one(self) -> None:
        """Kill the second node and all workers on it, as a power failure would."""
        assert self._owner.stdin is not None
        print("lose", file=self._owner.stdin, flush=True)
        self._answer()

    def _has_ended(self) -> bool:
        assert self._owner.stdout is not None
        return self._owner.stdout.closed  # by communicate, which then waits for the owner's end

    def _answer(self) -> str:
        assert self._owner.stdout is not None
        if line := self._owner.stdout.readline().strip():
            return line
        _, errors = self._owner.communicate()
        raise RuntimeError(f"Ray did not start two nodes on this machine:\n{errors[-2000:]}")

    def __enter__(self) -> TwoNodes:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._has_ended():
            self._owner.communicate()


def _read_variables_again() -> None:
    """Make Ray read its environment again, because it keeps the settings and the token that it read first."""
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def serve(cpus: int, config: Config) -> None:
    """Start two nodes and print the cluster's address. Remove the second when a line comes in; stop when input ends."""
    with forked_workers(config.run, config.parallel):
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
    serve(int(sys.argv[1]), Config.from_json(sys.argv[2]))
