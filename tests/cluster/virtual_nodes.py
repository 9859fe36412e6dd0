"""Virtual nodes: network, UTS, mount and PID namespaces on this machine, joined by a bridge.

Each node has its own address, host name, ``/etc/hosts``, ``/tmp`` and ``/dev/shm``; the rest of the file system is
shared, as on a cluster with a network file system. All nodes and their bridge live inside one more set of namespaces,
the *enclosure*. Its first process reads from a pipe that the process which started the nodes holds open. When that
process ends for any reason, the pipe closes, the enclosure's first process ends, and the kernel removes every process,
bridge and interface inside. Nothing is ever created in the machine's own network namespace.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")

_ENCLOSURE = """
set -e
mount --make-rprivate /
ip link set lo up
ip link add bridge type bridge
ip link set bridge up
echo ready
read -r _ || true
"""

_NODE = """
set -e
hostname "$NAME"
mount --bind "$HOSTS" /etc/hosts
# Shared directories may lie below /tmp. Hold them open while an empty /tmp is mounted over them.
kept=() number=0
for path in "$@"; do
    if [[ $path == /tmp/* && -d $path ]]; then exec {handle}<"$path"; kept+=("$handle" "$path"); fi
done
mount -t tmpfs tmpfs /tmp -o mode=1777
mount -t tmpfs tmpfs /dev/shm -o mode=1777
set -- "${kept[@]}"
while (($#)); do
    mkdir -p "$2"
    mount --no-canonicalize --bind "/proc/self/fd/$1" "$2"
    handle=$1
    exec {handle}<&-
    shift 2
done
echo ready
read -r _ || true
"""

_PLUG_IN = """
set -e
ip link add "$NAME" type veth peer name eth0 netns "$NODE"
ip link set "$NAME" master bridge up
nsenter --target "$NODE" --net bash -c "ip link set lo up; ip address add $ADDRESS/24 dev eth0; ip link set eth0 up"
"""


class Node:
    """One virtual node, started by :class:`VirtualNodes`."""

    def __init__(self, name: str, address: str, process: subprocess.Popen[str]) -> None:
        self.name, self.address = name, address
        self._process = process
        self.init = _first_process(process)

    def command(self, given: Sequence[str], directory: Path = ROOT) -> list[str]:
        """Return the command that runs ``given`` inside the node."""
        namespaces = ("--net", "--uts", "--mount", "--pid")
        return ["nsenter", "--target", str(self.init), *namespaces, f"--wdns={directory}", "--", *given]

    def start(self, given: Sequence[str], directory: Path = ROOT, **options: Any) -> subprocess.Popen[str]:
        """Start a command inside the node. Use :func:`end` to end it; a signal to ``nsenter`` is not enough."""
        return subprocess.Popen(
            self.command(given, directory), stdin=subprocess.DEVNULL, text=True, start_new_session=True, **options
        )

    def run(self, given: Sequence[str], timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside the node and wait for it.

        Raises:
            TimeoutExpired: it took too long and was killed.
        """
        process = self.start(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            end(process)
        return subprocess.CompletedProcess(given, process.returncode, output, errors)

    def bytes_sent(self, interface: str = "eth0") -> int:
        """Return the bytes that the node has sent over an interface so far."""
        for line in self.run(["cat", "/proc/net/dev"]).stdout.splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == interface:
                return int(counters.split()[8])
        raise ValueError(f"{self.name} has no interface {interface}")

    def kill(self) -> None:
        """Kill every process of the node at once, as when its power fails."""
        os.kill(self.init, signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every process of the node has ended."""
        self._process.wait(timeout)


class VirtualNodes:
    """Virtual nodes ``node1`` to ``nodeN``, as a context manager.

    Args:
        count: number of nodes.
        shared: directories below ``/tmp`` that all nodes see; the repository and the Python environment are shared
            anyway.
        names: further host names for ``/etc/hosts``, with their addresses.
    """

    def __init__(self, count: int, shared: Sequence[Path] = (), names: Mapping[str, str] | None = None) -> None:
        self.nodes: list[Node] = []
        self._addresses = {f"node{number}": f"10.80.0.{number}" for number in range(1, count + 1)}
        self._names = {"localhost": "127.0.0.1", **self._addresses, **(names or {})}
        environment = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1]}
        self._shared = [str(path.resolve()) for path in [ROOT, *sorted(environment), *shared]]

    def __enter__(self) -> VirtualNodes:
        self._scratch = Path(tempfile.mkdtemp(prefix="nodes-", dir="/var/tmp"))
        try:
            self._enclosure = _start([*UNSHARE, "--net", "bash", "-c", _ENCLOSURE])
            self._inside = _first_process(self._enclosure)
            for name, address in self._addresses.items():
                self.add(name, address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if enclosure := getattr(self, "_enclosure", None):
            enclosure.stdin.close()
            enclosure.wait(timeout=20)
        for node in self.nodes:
            node.wait(timeout=20)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, name: str, address: str) -> Node:
        """Add a node, which may replace one that was killed."""
        hosts = self._scratch / f"hosts-{name}"
        hosts.write_text("".join(f"{address} {name}\n" for name, address in self._names.items()))
        inside = ["nsenter", "--target", str(self._inside), "--net", "--uts", "--mount", "--pid", "--wdns=/", "--"]
        environment = {**os.environ, "NAME": name, "ADDRESS": address, "HOSTS": str(hosts)}
        process = _start([*inside, *UNSHARE, "--net", "bash", "-c", _NODE, "node", *self._shared], env=environment)
        node = Node(name, address, process)
        self.nodes.append(node)
        bridge = ["nsenter", "--target", str(self._inside), "--net", "bash", "-c", _PLUG_IN]
        subprocess.run(bridge, env={**environment, "NODE": str(node.init)}, check=True)
        return node


def end(process: subprocess.Popen[str]) -> None:
    """Kill a command that was started inside a node, and everything in its process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a shell that sets up namespaces and wait until it says that they are ready."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    assert process.stdout is not None and process.stderr is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise RuntimeError(f"A virtual node did not start: {process.stderr.read().strip()}")
    return process


def _first_process(process: subprocess.Popen[str]) -> int:
    """Return the outside id of process 1 in the namespace that ``process`` created."""
    return int(psutil.Process(process.pid).children(recursive=True)[-1].pid)
