"""``torchrun`` on two virtual nodes: the same numbers as on one node, and failures that end all ranks and say why."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.exported_weights import trained_weights
from tests.cluster.virtual_nodes import Node, VirtualNodes, end
from tests.distributed.cases import equivalence, small_runs
from tests.distributed.faults.checks import SOON
from tests.support.commands import train_command
from tutorial_lib import launch
from tutorial_lib.records import RunDirectory

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
C10D = ["--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400", "--rdzv-conf=join_timeout=60"]
SECONDS = 120


def static(node: Node) -> list[str]:
    return [f"--node-rank={int(node.name[-1]) - 1}", "--master-addr=node1", "--master-port=29500"]


def run_on(nodes: Sequence[Node], commands: Sequence[Sequence[str]], seconds: float = SECONDS) -> list[tuple[int, str]]:
    """Run one command on each node at the same time, and return exit codes and outputs."""
    started = [
        node.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for node, command in zip(nodes, commands, strict=False)
    ]
    until = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(until - time.monotonic(), 1))[0] for process in started]
        return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]
    finally:
        for process in started:
            end(process)


@pytest.fixture(scope="session")
def on_one_node(inputs: Path) -> dict[str, launch.Run]:
    """Train each case in this process, and return the runs by case."""
    cases = ("gpt2", "qwen2")
    return {case: launch.run(equivalence.reference(inputs, case).override(launcher="none")) for case in cases}


@pytest.mark.parametrize(
    ("rendezvous", "case", "shape", "per_node"),
    [
        ("static", "gpt2", {"dp": 2, "zero_stage": 2}, 1),
        ("c10d", "qwen2", {"dp": 2, "tp": 2, "zero_stage": 1}, 2),
    ],
)
def test_two_nodes_train_like_one(
    virtual_nodes: VirtualNodes,
    inputs: Path,
    tmp_path: Path,
    on_one_node: dict[str, launch.Run],
    rendezvous: str,
    case: str,
    shape: dict[str, int],
    per_node: int,
) -> None:
    settings = {**equivalence.CASES[case], **shape, "name": f"two-{rendezvous}", "launcher": "none"}
    config = small_runs.config(inputs, **settings)
    sent = [node.bytes_sent() for node in virtual_nodes.nodes]
    commands = [
        [*TORCHRUN, f"--nproc-per-node={per_node}", *(static(node) if rendezvous == "static" else C10D), "-m"]
        for node in virtual_nodes.nodes
    ]
    ended = run_on(virtual_nodes.nodes, [[*command, *train_command(config)] for command in commands])
    assert [code for code, _ in ended] == [0, 0], ended
    reference = on_one_node[case]
    ours, theirs = (RunDirectory(c.directory) for c in (config, reference.config))
    assert [row["step"] for row in ours.rows()] == [row["step"] for row in theirs.rows()]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in ours.rows()] == pytest.approx([row[key] for row in theirs.rows()], rel=1e-6), key
    weights, expected = trained_weights(ours, tmp_path), trained_weights(theirs, tmp_path)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert (tensor - expected[name]).abs().max() <= 1e-6, name
    # The gradients went over the network, and the node of each rank was logged once.
    elements = sum(tensor.numel() for tensor in weights.values())
    for node, before in zip(virtual_nodes.nodes, sent, strict=True):
        assert node.bytes_sent() - before > 4 * elements / shape.get("tp", 1)
    table = [line.split() for _, output in ended for line in output.splitlines()]
    assert sum("2 nodes met at node" in " ".join(words) for words in table) == 1
    placed = {int(words[0]): words[3] for words in table if len(words) == 6 and words[-1] == "cpu"}
    assert sorted(placed) == list(range(2 * per_node))
    assert sorted(placed.values()) == [node.name for node in virtual_nodes.nodes for _ in range(per_node)]


FAILURES = {
    "killed.in_forward": (
        r"Root Cause(.*\n)+?  rank +: 1 \(local_rank: 0\)\n  exitcode +: -9 .*\(SIGKILL\)",
        r"error: Rank 0 of run '\S+' lost the connection to another rank, .*Rank 1 left no error: it was killed, "
        r"perhaps for lack of memory, or its node was lost\. Run the same command again.* resumes: .*step-00000002\.",
    ),
    "storage.save_raises": (
        r"error: Rank 1 of run '\S+' failed with OSError: the disk is full\n\nTraceback(.*\n)+?.*in save_if_due",
        r"error: Rank 0 of run '\S+' ends because rank 1, on node2, failed with OSError: the disk is full\n",
    ),
}
"""For each fault, patterns of the output on node2, where rank 1 failed, and of the output on node1."""


@pytest.mark.fault(
    "SIGKILL of a rank under torchrun",
    "torchrun names the rank and the signal on its node; ranks of other nodes name the rank that left no error",
)
@pytest.mark.parametrize("fault", list(FAILURES) if equivalence.MATRIX else ["killed.in_forward"])
def test_a_rank_that_fails_ends_all_ranks_which_name_it(virtual_nodes: VirtualNodes, inputs: Path, fault: str) -> None:
    """An exception on a single node is tested in ``tests/distributed/test_torchrun.py``."""
    settings = {**equivalence.CASES["gpt2"], "dp": 2, "zero_stage": 1, "steps": 8, "checkpoint_every": 2}
    config = small_runs.config(inputs, **settings, name=f"torchrun-{fault}", launcher="none")
    program = ["-m", "tests.distributed.workers.with_fault", fault, *train_command(config)[1:]]
    ended = run_on(virtual_nodes.nodes, [[*TORCHRUN, *static(node), *program] for node in virtual_nodes.nodes])
    failed_at = max(record["time"] for record in RunDirectory(config.directory).errors())
    assert time.time() - failed_at < SOON
    assert [code for code, _ in ended] == [1, 1], ended
    (_, elsewhere), (_, there) = ended
    for expected, output in zip(FAILURES[fault], (there, elsewhere), strict=True):
        assert re.search(expected, output), output


@pytest.mark.fault(
    "the head node's name does not resolve",
    "`doctor --rendezvous`, which the batch script runs first, names it; torchrun gives up after the timeout in its "
    "flags",
)
@pytest.mark.fault("a node never joins torchrun", "torchrun gives up after the timeout in its flags")
def test_torchrun_waits_as_long_as_its_flags_say(virtual_nodes: VirtualNodes) -> None:
    """The batch script limits these waits with flags, because they happen in torchrun, before any of our code runs."""
    waits = {
        "(nowhere, 29400)": ["--rdzv-backend=c10d", "--rdzv-endpoint=nowhere:29400", "--rdzv-conf=read_timeout=2"],
        "RendezvousTimeoutError": ["--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400", "--rdzv-conf=join_timeout=2"],
        "imed": ["--master-addr=node1", "--master-port=29500", "--node-rank=0", "--rdzv-conf=timeout=2"],
    }
    commands = [[*TORCHRUN, *given, "-m", "tutorial_lib"] for given in waits.values()]
    ended = run_on(virtual_nodes.nodes[:1] * len(commands), commands, seconds=60)
    for why, (code, output) in zip(waits, ended, strict=True):
        assert code == 1
        assert why in output


@pytest.mark.fault("the rendezvous port is in use", "`doctor --rendezvous` names it")
def test_a_rendezvous_is_checked_before_torchrun_starts(virtual_nodes: VirtualNodes) -> None:
    first, second = virtual_nodes.nodes

    def check(node: Node, endpoint: str) -> tuple[int, str]:
        done = node.run([sys.executable, "-m", "tutorial_lib", "doctor", "--rendezvous", endpoint])
        return done.returncode, done.stderr

    assert check(first, "node1:29400") == check(second, "node1:29400") == (0, "")
    code, error = check(second, "nowhere:29400")
    assert code == 2 and "node2 cannot resolve the name 'nowhere'" in error and "getent hosts nowhere" in error
    listening = first.start([sys.executable, "-m", "http.server", "29401"], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 20
        while check(first, "node1:29401")[0] == 0:
            assert time.monotonic() < until
        assert "Port 29401 of node1 is in use" in check(first, "node1:29401")[1]
        assert check(second, "node1:29401")[0] == 0, "only node1, where torchrun would listen, can tell"
    finally:
        end(listening)


@pytest.mark.fault(
    "`GLOO_SOCKET_IFNAME` names the loopback",
    "refused with exit code 2; the error lists other interfaces",
)
def test_the_loopback_is_refused(virtual_nodes: VirtualNodes, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process is enough here. The other node would refuse for the same reason."""
    config = small_runs.config(inputs, model="gpt2", name="loopback", launcher="none", dp=2)
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in {**own, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    ((code, output),) = run_on(virtual_nodes.nodes[:1], [[sys.executable, "-m", *train_command(config)]])
    assert code == 2
    assert "'lo', the loopback interface. Other nodes cannot reach it" in output
    assert "eth0 (10.80.0.1)" in output


@pytest.mark.fault(
    "`GLOO_SOCKET_IFNAME` names an interface that exists, but does not lead to the other nodes",
    "all ranks end after at most 20 s; each error names the rank that cannot be reached and its node's interfaces",
)
def test_an_interface_that_leads_nowhere_is_named_by_all_ranks(virtual_nodes: VirtualNodes) -> None:
    first, second = virtual_nodes.nodes
    for action in ("link add lonely type bridge", "address add 10.70.0.2/24 dev lonely", "link set lonely up"):
        assert second.run(["ip", *action.split()]).returncode == 0
    join = (
        "from tutorial_lib.config import Config\n"
        "from tutorial_lib.launch.torchrun import process_group\n"
        "with process_group(Config.create(launcher='none', dp=2).run, 'env://'): pass"
    )
    shared = ["LOCAL_RANK=0", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=1", "MASTER_ADDR=node1", "MASTER_PORT=29510"]
    own = [("RANK=0", "GLOO_SOCKET_IFNAME=eth0"), ("RANK=1", "GLOO_SOCKET_IFNAME=lonely")]
    try:
        ended = run_on([first, second], [["env", *shared, *each, sys.executable, "-c", join] for each in own])
    finally:
        second.run(["ip", "link", "delete", "lonely"])
    for code, output in ended:
        assert code == 1
        assert (
            "Rank 0, on node1, cannot reach rank 1, on node2, at 10.70.0.2, the address of GLOO_SOCKET_IFNAME=lonely: "
            "Network is unreachable. On node2, set GLOO_SOCKET_IFNAME to the interface" in output
        ), output
        assert "eth0 (10.80.0.2)" in output
