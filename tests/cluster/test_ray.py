"""Ray on two virtual nodes: placement of ranks, a node that is lost and comes back, and refusals with a reason."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.exported_weights import trained_weights
from tests.cluster.ray_cluster import RayCluster, wait_until
from tests.cluster.ray_program import HELD_AT, IS_BACK, TIMEOUT
from tests.cluster.requirements import missing_tools, skip_for
from tests.cluster.virtual_nodes import VirtualNodes, end
from tests.distributed.cases import equivalence, small_runs
from tutorial_lib import checkpoint, launch
from tutorial_lib.config import Config
from tutorial_lib.records import RunDirectory

SECONDS = 200
STEPS = 24
CASE = {**equivalence.CASES["qwen2"], "evaluate": False, "steps": STEPS}
ELASTIC = {"dp": 2, "tp": 2, "min_dp": 1, "engine": "fsdp", "max_failures": 1, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def ray_cluster(shared: Path) -> Iterator[RayCluster]:
    """Start Ray on two separate nodes, because the tests remove one."""
    skip_for(missing_tools())
    with VirtualNodes(2, [shared]) as own, RayCluster(own) as started:
        yield started


class Program:
    """A program on the head node, running one configuration."""

    def __init__(self, cluster: RayCluster, name: str, config: Config, inputs: Path) -> None:
        self.run, self.log = RunDirectory(config.directory), inputs / f"{name}.log"
        given = inputs / f"{name}.json"
        given.write_text(config.to_json())
        self.process: subprocess.Popen[str] = cluster.drive(
            ["-m", "tests.cluster.ray_program", name, str(given)], self.log
        )

    def wait_until(self, condition: Callable[[], object]) -> None:
        wait_until(lambda: condition() or self.process.poll() is not None, SECONDS, self.log.read_text)
        assert condition(), self.log.read_text()

    def places(self) -> list[list[str]]:
        """Return the node of each rank, in the order of ranks, for each start of the run so far."""
        log = self.run.log_file(0)
        text = log.read_text() if log.exists() else ""
        tables = re.findall(r"rank +dp +tp node +local rank device\n((?: +\d+ +\d+ +\d+ \w+ +\d+ cpu\n)+)", text)
        return [[line.split()[3] for line in table.splitlines()] for table in tables]


@pytest.mark.fault(
    "other jobs occupy part of the cluster",
    "ends after `resource_timeout` with an error that lists what the run needs and what is free on each node",
)
@pytest.mark.fault(
    "no node has enough CPUs or GPUs for a tensor-parallel group",
    "refused before a rank starts, with what each node has",
)
@pytest.mark.fault(
    "a node does not see the storage, or has a directory of its own at that path",
    "refused before a rank starts, with the node and the directory",
)
def test_a_run_that_does_not_fit_the_cluster_is_refused_with_the_reason(ray_cluster: RayCluster, inputs: Path) -> None:
    config = small_runs.config(inputs, **{**CASE, "steps": 1}, dp=2, zero_stage=1, name="refused", launcher="ray")
    ray_cluster.nodes.nodes[1].run(["mkdir", "-p", "/tmp/own-runs/own"])  # node1 has a different directory at this path
    program = Program(ray_cluster, "refusals", config, inputs)
    try:
        assert program.process.wait(timeout=SECONDS) == 0, program.log.read_text()
    finally:
        end(program.process)
    outcomes = json.loads(program.log.read_text().splitlines()[-1])
    expected = {
        "private": (
            "ConfigError",
            r"^node2 has no directory /tmp/private-runs/private, although node1 has created it\. .* write storage=",
        ),
        "own": (
            "ConfigError",
            r"^node2 has its own /tmp/own-runs/own: it does not see what node1 writes there\. .* write storage=",
        ),
        "wide": (
            "ConfigError",
            r"^The 4 workers of a tensor-parallel group share a node, but the Ray cluster has too few nodes with 4 "
            r"CPUs for 1 group: 3 on node\d, 3 on node\d\. Write a smaller tp",
        ),
        "large": ("ConfigError", r"^8 workers need 8 CPUs, but the Ray cluster has 6: 3 on node\d, 3 on node\d\."),
        "busy": (
            "WorkerError",
            r"^The run needs 2 groups of 2 workers on one node, each with 1 CPU, but for \d s the Ray cluster had no "
            r"room for them\. Free now, on 2 nodes: node\d: [13] of 3 CPUs; node\d: [13] of 3 CPUs\.",
        ),
    }
    for name, (kind, words) in expected.items():
        assert outcomes[name][0] == kind, outcomes[name]
        assert re.search(words, outcomes[name][1]), outcomes[name]
    assert outcomes["busy"][2] > TIMEOUT


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.fault(
    "a node with half of the ranks loses power, `max_failures=1`, `min_dp`",
    "continues with as many ranks as fit, from the newest intact checkpoint; tensor-parallel groups stay whole",
)
@pytest.mark.fault("the node comes back", "returns to all its ranks at the next checkpoint")
def test_a_run_continues_without_a_lost_node_and_grows_when_it_returns(
    ray_cluster: RayCluster, inputs: Path, tmp_path: Path
) -> None:
    config = small_runs.config(inputs, **CASE, **ELASTIC, name="elastic", launcher="ray")
    program = Program(ray_cluster, "elastic", config, inputs)
    try:
        alone = {"engine": "torch", "dp": 1, "launcher": "none"}  # in this process, while Ray starts
        whole = launch.run(small_runs.config(inputs, **CASE, **alone, name="elastic-reference"))
        program.wait_until(lambda: checkpoint.directory_of(program.run, HELD_AT).exists())
        ray_cluster.nodes.nodes[1].kill()
        program.wait_until(lambda: len(program.places()) == 2)
        ray_cluster.join(ray_cluster.nodes.add("node2", "10.80.0.2"))
        (config.directory / IS_BACK).touch()
        program.wait_until(lambda: program.run.result_file.exists())
        assert program.process.wait(timeout=30) == 0, program.log.read_text()
    finally:
        end(program.process)
    # In each of the three starts, the two ranks of a tensor-parallel group share a node, although a node has room for
    # three ranks.
    for places in program.places():
        assert all(first == second for first, second in zip(places[::2], places[1::2], strict=True)), places
    assert [sorted(places) for places in program.places()] == [
        ["node1", "node1", "node2", "node2"], ["node1", "node1"], ["node1", "node1", "node2", "node2"]
    ]  # fmt: skip
    (restart,) = program.run.result()["restarts"]
    assert restart["from_step"] == HELD_AT
    result = program.run.result()
    assert result["resumed_from"] > HELD_AT and result["reshaped_from"]["dp"] == 1
    # No example is repeated or left out, and the numbers are those of one uninterrupted process.
    ours, theirs = program.run.rows(), whole.rows
    for key in ("step", "tokens", "epoch", "lr"):
        assert [row[key] for row in ours] == [row[key] for row in theirs], key
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-6), key
    weights, expected = trained_weights(program.run, tmp_path), trained_weights(whole.directory, tmp_path)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert (tensor - expected[name]).abs().max() <= 1e-6, name
