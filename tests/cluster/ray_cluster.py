"""A Ray cluster on virtual nodes: ``ray start --head`` on the first node, ``ray start --address`` on the others.

Ray's processes live inside the nodes' namespaces, and end with them. Every client needs a token that is created here,
as on clusters that ``tutorial_lib`` starts itself.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cluster.virtual_nodes import ROOT, Node, VirtualNodes, end
from tutorial_lib.launch.ray import lean_imports
from tutorial_lib.launch.ray.nodes import NOTICE_A_LOST_NODE

PORT = 6379
CPUS = 3
"""CPUs of each node. With three, Ray Train's own placement of two groups of two ranks would put three on one node."""


class RayCluster:
    """A running Ray cluster on virtual nodes, as a context manager. The first node is its head.

    Args:
        nodes: the virtual nodes, on which Ray starts.
    """

    def __init__(self, nodes: VirtualNodes) -> None:
        self.nodes = nodes
        self.head = nodes.nodes[0]
        self.environment = {
            **os.environ,
            # The replacements in `lean_imports` save each of Ray's many processes a second of imports.
            "PYTHONPATH": f"{Path(lean_imports.__file__).parent}:{ROOT}",
            "RAY_ADDRESS": f"{self.head.address}:{PORT}",
            **NOTICE_A_LOST_NODE,
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }

    def __enter__(self) -> RayCluster:
        self.start(self.head, "--head", f"--port={PORT}", "--include-dashboard=false")
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.join, self.nodes.nodes[1:]))
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: Ray's processes end with their nodes' namespaces."""

    def join(self, node: Node) -> None:
        """Start Ray on a node, as a member of the cluster."""
        self.start(node, f"--address={self.environment['RAY_ADDRESS']}")

    def start(self, node: Node, *options: str) -> None:
        """Run ``ray start`` on a node."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        command += [f"--node-ip-address={node.address}", f"--num-cpus={CPUS}", "--num-gpus=0"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        log = subprocess.DEVNULL
        done = node.start(command, env=environment, stdout=log, stderr=subprocess.PIPE)
        try:
            _, errors = done.communicate(timeout=60)
        finally:
            if done.poll() is None:
                end(done)
        if done.returncode:
            raise RuntimeError(f"Ray did not start on {node.name}: {errors}")

    def drive(self, given: list[str], log: Path) -> subprocess.Popen[str]:
        """Start a Python program on the head node, connect it to the cluster, and write its output to a file."""
        file = log.open("w")
        return self.head.start([sys.executable, *given], env=self.environment, stdout=file, stderr=subprocess.STDOUT)


def wait_until(condition: Callable[[], object], seconds: float, why: Callable[[], str]) -> None:
    """Wait for something to become true, or fail with an explanation."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, why()
        time.sleep(0.1)
