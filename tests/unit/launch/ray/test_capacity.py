"""Room on a Ray cluster: the groups that nodes hold, the sizes that a run can continue with, and messages."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch.ray import placement
from tutorial_lib.launch.ray.capacity import (
    Demand,
    Node,
    ResourcesMissing,
    StoppedWaiting,
    check_capacity,
    describe_missing,
    possible_sizes,
    resized,
)
from tutorial_lib.launch.ray.placement import BoundedScaling
from tutorial_lib.records import RunDirectory

ELASTIC: dict[str, Any] = {"launcher": "ray", "checkpoint_every": 2}


def node(name: str, total: float, free: float | None = None, gpus: float = 0) -> Node:
    has = {"CPU": total, "GPU": gpus}
    return Node(name, name, has, {**has, "CPU": total if free is None else free})


def test_a_group_is_not_split_over_nodes() -> None:
    demand = Demand({"CPU": 1}, tp=2, sizes=(2,))
    assert [demand.groups_on({"CPU": cpus}) for cpus in (0, 1, 2, 3, 4)] == [0, 0, 1, 1, 2]
    check_capacity(demand, [node("a", 2), node("b", 3)])
    with pytest.raises(ConfigError, match=r"share a node.* with 2 CPUs for 2 groups: 3 on a, 1 on b\. Write a smaller"):
        check_capacity(demand, [node("a", 3), node("b", 1)])
    on_gpus = Demand({"CPU": 1, "GPU": 1}, tp=2, sizes=(1,))
    assert on_gpus.groups_on({"CPU": 8, "GPU": 3}) == 1
    with pytest.raises(ConfigError, match=r"2 workers need 2 GPUs, but the Ray cluster has 1: 1 on a, 0 on b.*'cpu'"):
        check_capacity(on_gpus, [node("a", 8, gpus=1), node("b", 8)])


def test_possible_sizes_divide_the_global_batch() -> None:
    config = Config.create(dp=4, global_batch=12, min_dp=1, **ELASTIC)
    assert possible_sizes(config) == [1, 2, 3, 4]
    assert possible_sizes(config.override(global_batch=8)) == [1, 2, 4]
    assert possible_sizes(config.override(min_dp=2)) == [2, 3, 4]
    assert possible_sizes(config.override(min_dp=None)) == [4]
    hybrid = config.override(engine="fsdp", sharding="hybrid_shard", shard_size=2, global_batch=8)
    assert possible_sizes(hybrid) == [4], "two ranks would be one copy, not a hybrid"


def test_fewer_ranks_take_more_micro_batches_and_no_larger_ones() -> None:
    config = Config.create(dp=4, global_batch=24, min_dp=1, **ELASTIC)
    assert (config.micro_batch, config.accumulation) == (6, 1)
    shapes = {dp: (resized(config, dp).micro_batch, resized(config, dp).accumulation) for dp in (1, 2, 3, 4)}
    assert shapes == {1: (6, 4), 2: (6, 2), 3: (2, 4), 4: (6, 1)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_dp": 1, "checkpoint_every": 2}, "min_dp=1 is for Ray Train; launcher='local' does not wait"),
        ({"resource_timeout": 5}, "resource_timeout=5 is for Ray Train"),
        ({"min_dp": 3, **ELASTIC}, "min_dp=3 is more than dp=2"),
        ({"min_dp": 1, "launcher": "ray"}, "checkpoint_every=0 saves only at the end. Write a checkpoint_every"),
    ],
)
def test_conflicting_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.create(dp=2, **settings)


def test_missing_resources_are_listed_by_node() -> None:
    said = describe_missing(Demand({"CPU": 1.0}, tp=1, sizes=(2, 4)), [node("a", 2, free=1), node("b", 2, free=0)], 300)
    assert said.startswith(
        "The run needs at least 2 workers, each with 1 CPU, but for 300 s the Ray cluster had no room for them. Free "
        "now, on 2 nodes: a: 1 of 2 CPUs; b: 0 of 2 CPUs."
    )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return a fake cluster's free CPUs by node."""
    free = {"a": 2.0, "b": 2.0}
    monkeypatch.setattr(placement, "read_nodes", lambda: [node(name, 2, cpus) for name, cpus in free.items()])
    monkeypatch.setattr(BoundedScaling, "_maybe_send_resource_request", lambda self: None)
    return free


def policy(directory: Path, *sizes: int, timeout: float = 0, settle: float = 0) -> BoundedScaling:
    demand = Demand({"CPU": 1.0}, tp=2, sizes=sizes)
    scaling = ScalingConfig(num_workers=sizes[-1] * 2)
    return BoundedScaling(scaling, demand, timeout=timeout, settle=settle, every=0, directory=directory)


def test_a_run_without_resources_waits_for_resource_timeout(cluster: dict[str, float], tmp_path: Path) -> None:
    fixed = policy(tmp_path, 2, timeout=0.2)
    cluster["b"] = 1
    began = time.monotonic()
    with pytest.raises(ResourcesMissing, match=r"2 groups of 2 workers on one node.*b: 1 of 2 CPUs"):
        while isinstance(fixed.make_decision_for_non_running_worker_group(), NoopDecision):
            time.sleep(0.01)
    assert 0.2 <= time.monotonic() - began < 20
    cluster["b"] = 2
    decision = fixed.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision) and decision.num_workers == 4


def test_a_run_that_waits_for_room_can_be_stopped(cluster: dict[str, float], tmp_path: Path) -> None:
    """Only a worker notices a stop request otherwise, and a failed run that waits to restart has none."""
    waiting = policy(tmp_path, 2, timeout=300)
    waiting.run.stop_file.write_text("now")
    decision = waiting.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision), "where there is room, workers start, and write the result of the stop"
    cluster["b"] = 1
    with pytest.raises(StoppedWaiting, match="was asked to stop while it waited for room on the Ray cluster"):
        waiting.make_decision_for_non_running_worker_group()


def test_an_elastic_run_waits_briefly_for_its_full_size(cluster: dict[str, float], tmp_path: Path) -> None:
    cluster["b"] = 0
    patient = policy(tmp_path, 1, 2, settle=60, timeout=60)
    assert isinstance(patient.make_decision_for_non_running_worker_group(), NoopDecision)
    decision = policy(tmp_path, 1, 2).make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision) and decision.num_workers == 2


def test_a_run_grows_when_there_is_room_and_it_has_just_saved(cluster: dict[str, float], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create()
    elastic = policy(tmp_path, 1, 2)
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id="a"))] * 2
    state = SimpleNamespace(workers=workers)
    cluster.update(a=0, b=0)

    def decide() -> int | None:
        decision = elastic.make_decision_for_running_worker_group(state, None)
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    assert [decide(), decide()] == [None, None]
    cluster["b"] = 2
    assert [decide(), decide()] == [None, None], "it would train the steps since its last checkpoint twice"
    (run.checkpoints / "step-00000002").mkdir()
    assert decide() == 4
    state.workers = workers * 2
    assert decide() is None
