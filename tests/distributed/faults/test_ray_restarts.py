"""Ray workers and nodes that die: Ray starts the workers again, from the newest checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.cases import crashing
from tests.distributed.faults.checks import assert_all_intact, assert_same_records, assert_same_states
from tests.distributed.observing.comparing import Observed
from tests.support.launching import ROOT
from tutorial_lib import launch
from tutorial_lib.config import Config
from tutorial_lib.launch.ray import cluster
from tutorial_lib.launch.ray import train as ray_train
from tutorial_lib.launch.ray.nodes import NOTICE_A_LOST_NODE


@pytest.fixture
def three_nodes() -> Iterator[Any]:
    """Start three Ray nodes of one slot each, as raylets here. Rank 1 is not on the first one, which must survive."""
    with pytest.MonkeyPatch.context() as patch:
        ours = {"PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": cluster.TOKEN, "GLOO_SOCKET_IFNAME": "lo"}
        for name, value in {**cluster.SETTINGS, **NOTICE_A_LOST_NODE, **ours}.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        before = set(psutil.Process().children())
        try:
            nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        except Exception:  # on a busy machine, a node that has not started within 30 s
            cluster.end_processes(set(psutil.Process().children()) - before)
            raise
        try:
            for _ in range(2):
                nodes.add_node(num_cpus=1)
            patch.setenv("RAY_ADDRESS", nodes.address)
            yield nodes
        finally:
            cluster.stop()
            nodes.shutdown()


def on_ray(directory: Path, name: str, **changes: Any) -> Config:
    return crashing.saving(directory, "zero1", name, launcher="ray", max_failures=1, **changes)


@pytest.mark.fault(
    "SIGKILL of a Ray worker while it reports, `max_failures=1`",
    "Ray starts the workers again; `result.json` records when and why",
)
def test_a_killed_worker(uninterrupted: dict[str, Observed], directory: Path) -> None:
    config = on_ray(directory, "ray-killed")
    with ray_train.session(config):
        (run,) = launch.run_all([config], worker="tests.distributed.workers.killed_on_ray")
    (restart,) = run.result["restarts"]
    assert (run.result["resumed_from"], restart["from_step"], restart["failed"]["rank"]) == (4, 4, 1)
    assert restart["failed"]["type"] == "ActorDiedError", restart
    assert abs(time.time() - restart["time"]) < 600
    assert_same_records(run.directory, uninterrupted["zero1"].directory)
    assert_same_states(run.directory, uninterrupted["zero1"].directory)
    assert assert_all_intact(run.directory) == [2, 4, 6, 8]


@pytest.mark.fault("a Ray node dies, another has room, `max_failures=1`", "Ray starts the workers on the other node")
def test_a_node_that_dies(uninterrupted: dict[str, Observed], three_nodes: Any, directory: Path) -> None:
    config = on_ray(directory, "ray-node", **crashing.LONG)
    gone: list[Any] = []

    def remove_a_node(rows: list[Any]) -> None:
        if gone or rows[-1]["step"] < 3:
            return
        for node in three_nodes.worker_nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            if any("RayTrainWorker" in " ".join(p.cmdline()) for p in raylet.children(recursive=True)):
                gone.append(node)
                three_nodes.remove_node(node, allow_graceful=False)
                return

    with ray_train.session(config):
        run = launch.run(config, on_rows=remove_a_node)
    assert gone
    (restart,) = run.result["restarts"]
    assert run.result["resumed_from"] == restart["from_step"] >= 2
    assert_same_records(run.directory, uninterrupted["long"].directory)
    assert_same_states(run.directory, uninterrupted["long"].directory)
    assert_all_intact(run.directory)
