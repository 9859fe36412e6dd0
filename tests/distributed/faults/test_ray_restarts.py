"""Ray workers and nodes that die, after which Ray starts the workers again from the newest checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import crashing
from tests.distributed.faults.checks import assert_all_intact, assert_same_records, assert_same_states
from tests.distributed.observing.comparing import Observed
from tutorial_lib import launch
from tutorial_lib.config import Config
from tutorial_lib.launch.ray import train as ray_train
from tutorial_lib.launch.ray.nodes import TwoNodes


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
def test_a_node_that_dies(uninterrupted: dict[str, Observed], directory: Path) -> None:
    """Each node has two CPUs, of which another job first occupies one. So the two ranks start on different nodes."""
    config = on_ray(directory, "ray-node", **crashing.LONG)
    lost: list[int] = []
    with TwoNodes(config, cpus=2) as nodes, nodes.joined(), ray_train.session(config):
        from ray.util import placement_group, remove_placement_group

        other_job = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
        assert other_job.wait(30)

        def lose_a_node(rows: list[Any]) -> None:
            if not lost and rows[-1]["step"] >= 3:
                lost.append(rows[-1]["step"])
                remove_placement_group(other_job)
                nodes.lose_one()

        run = launch.run(config, on_rows=lose_a_node)
    assert lost
    (restart,) = run.result["restarts"]
    assert run.result["resumed_from"] == restart["from_step"] >= 2
    assert_same_records(run.directory, uninterrupted["long"].directory)
    assert_same_states(run.directory, uninterrupted["long"].directory)
    assert_all_intact(run.directory)
