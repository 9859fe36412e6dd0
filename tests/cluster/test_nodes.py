"""Virtual nodes are separate machines as far as a program can tell, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.cluster.virtual_nodes import ROOT, VirtualNodes, end


def test_each_node_has_its_own_name_address_and_temporary_files(virtual_nodes: VirtualNodes, shared: Path) -> None:
    first, second = virtual_nodes.nodes
    (shared / "seen-by-all").touch()
    first.run(["touch", "/tmp/of-the-first", "/dev/shm/of-the-first"])
    assert [node.run(["hostname"]).stdout for node in (first, second)] == ["node1\n", "node2\n"]
    assert first.run(["getent", "hosts", "node2"]).stdout.split() == ["10.80.0.2", "node2"]
    assert second.run(["ls", "/tmp/of-the-first"]).returncode != 0
    assert second.run(["ls", "/dev/shm/of-the-first"]).returncode != 0
    assert second.run(["ls", str(shared / "seen-by-all")]).returncode == 0


def test_nodes_reach_only_each_other(virtual_nodes: VirtualNodes) -> None:
    first, second = virtual_nodes.nodes
    listening = first.start(
        [sys.executable, "-m", "http.server", "--bind", "10.80.0.1", "8000"], stderr=subprocess.PIPE
    )
    fetch = "import sys, urllib.request as r; r.urlopen('http://node1:8000/', timeout=5)"
    try:
        _wait_until(lambda: second.run([sys.executable, "-c", fetch]).returncode == 0)
        assert second.bytes_sent() > 100
    finally:
        end(listening)
    # There is no route to anywhere else.
    assert second.run(["ip", "route", "get", "192.0.2.1"]).returncode != 0


def test_a_killed_node_is_gone_at_once(virtual_nodes: VirtualNodes, shared: Path) -> None:
    """The fixture ``virtual_nodes`` is only here to skip the test where virtual nodes cannot start."""
    with VirtualNodes(2, [shared]) as nodes:
        sleeping = nodes.nodes[0].start(["sleep", "1000"])
        nodes.nodes[0].kill()
        assert sleeping.wait(timeout=5) != 0
        again = nodes.add("node1", "10.80.0.1")
        assert again.run(["hostname"]).stdout == "node1\n"


_PROGRAM = """
import sys
from pathlib import Path
from tests.cluster.virtual_nodes import VirtualNodes
from tests.cluster.slurm_cluster import SlurmCluster
directory = Path(sys.argv[1])
with VirtualNodes(2, [directory]) as nodes, SlurmCluster(nodes, directory):
    print("ready", flush=True)
    sys.stdin.readline()
    raise AssertionError
"""


def test_nothing_is_left_when_a_test_fails_or_pytest_is_killed(cluster: object, tmp_path: Path) -> None:
    """The fixture ``cluster`` is only here to skip the test where SLURM cannot start."""
    interfaces = os.listdir("/sys/class/net")
    for how in ("fails", "is killed"):
        directory = tmp_path / how.split()[-1]
        directory.mkdir()
        before = _namespaces()
        program = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(directory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        daemons = _daemons(directory)
        used = _namespaces(daemons) - before
        assert daemons and used
        if how == "is killed":
            program.send_signal(signal.SIGKILL)
        program.communicate(timeout=20)
        _wait_until(lambda: not _daemons(directory), 5)  # noqa: B023
        _wait_until(lambda: not _namespaces() & used, 5)  # noqa: B023
    assert os.listdir("/sys/class/net") == interfaces


def _namespaces(processes: Iterable[Path] = ()) -> set[str]:
    """Return the network namespaces of some processes, or of all."""
    found = set()
    for process in processes or Path("/proc").glob("[0-9]*"):
        try:
            found.add(os.readlink(process / "ns" / "net"))
        except OSError:  # it has just ended
            continue
    return found


def _daemons(directory: Path) -> list[Path]:
    """Return the processes whose command line or environment names this directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in files and int(process.name) != os.getpid():
            found.append(process)
    return found


def _wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.05)
