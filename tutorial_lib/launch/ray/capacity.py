"""Capacity of a Ray cluster: the tensor-parallel groups that its nodes can hold, and messages about missing resources.

A tensor-parallel group (``tp`` workers that share every layer) must fit on one node. So a node with 3 free CPUs has
room for one group of ``tp=2``, and the run cannot use its third CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch.command import plural


class ResourcesMissing(RuntimeError):
    """The cluster had no room for the run within the timeout. The message lists its resources, node by node."""


class StoppedWaiting(ResourcesMissing):
    """The run was asked to stop while the cluster had no room for it."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive, with its total and free resources (``CPU``, ``GPU``)."""

    id: str
    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Demand:
    """Resources that a run needs.

    Attributes:
        per_worker: resources of one worker.
        tp: number of workers in a tensor-parallel group.
        sizes: data-parallel sizes that the run can continue with, smallest first.
    """

    per_worker: Mapping[str, float]
    tp: int
    sizes: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Config) -> Demand:
        """Return the demand of a configuration."""
        per_worker = {"CPU": 1.0, "GPU": 1.0} if config.run.device == "cuda" else {"CPU": 1.0}
        return cls(per_worker, config.parallel.tp, tuple(possible_sizes(config)))

    def groups_on(self, resources: Mapping[str, float]) -> int:
        """Return the number of tensor-parallel groups that fit into these resources of one node."""
        return min(int(resources.get(kind, 0) // (each * self.tp)) for kind, each in self.per_worker.items())

    def largest_size(self, groups: int) -> int | None:
        """Return the largest data-parallel size that this many groups allow, or None if there are too few."""
        return max((size for size in self.sizes if size <= groups), default=None)


def possible_sizes(config: Config) -> list[int]:
    """Return the data-parallel sizes that a run can continue with: from ``min_dp``, if that is set, up to ``dp``.

    Sizes that the configuration cannot run with are left out, such as one that does not divide ``global_batch``.
    """
    least = config.parallel.dp if config.run.min_dp is None else config.run.min_dp
    return [size for size in range(least, config.parallel.dp) if _can_run(config, size)] + [config.parallel.dp]


def _can_run(config: Config, dp: int) -> bool:
    from tutorial_lib.engine.deepspeed.config import apply_file

    try:
        apply_file(resized(config, dp))
    except ConfigError:
        return False
    return True


def resized(config: Config, dp: int) -> Config:
    """Adapt a configuration to fewer data-parallel ranks, with the same global batch and no larger micro-batches.

    Raises:
        ConfigError: the configuration cannot run with this many ranks.
    """
    if dp == config.parallel.dp:
        return config
    flat = {"dp": dp, "min_dp": None}
    if config.run.global_batch % dp == 0:
        flat["micro_batch"] = math.gcd(config.run.global_batch // dp, config.micro_batch)
    return config.replaced(**flat)


def read_nodes() -> list[Node]:
    """Return the cluster's live nodes as Ray's head node knew them, at most a few seconds ago."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        Node(each["NodeID"], each["NodeManagerHostname"], each["Resources"], free.get(each["NodeID"], {}))
        for each in ray.nodes()
        if each["Alive"]
    ]


def check_capacity(demand: Demand, nodes: Sequence[Node]) -> None:
    """Refuse a run that does not fit the cluster even if nothing else runs there.

    Raises:
        ConfigError: lists what the run needs, and what each node has.
    """
    if demand.largest_size(sum(demand.groups_on(node.total) for node in nodes)):
        return
    workers = demand.sizes[0] * demand.tp
    for kind, each in demand.per_worker.items():
        offered = sum(node.total.get(kind, 0) for node in nodes)
        if offered < each * workers:
            raise ConfigError(
                f"{workers} workers need {each * workers:g} {kind}s, but the Ray cluster has {offered:g}"
                f"{_by_node(nodes, kind)}. Write a smaller dp"
                + (", or device='cpu'." if kind == "GPU" else ", or add nodes to the cluster.")
            )
    kind = "GPU" if "GPU" in demand.per_worker else "CPU"
    groups = plural(demand.sizes[0], "group", "groups")
    raise ConfigError(
        f"The {demand.tp} workers of a tensor-parallel group share a node, but the Ray cluster has too few nodes with "
        f"{demand.tp} {kind}s for {groups}{_by_node(nodes, kind)}. Write a smaller tp, or add larger nodes."
    )


def describe_missing(demand: Demand, nodes: Sequence[Node], seconds: float) -> str:
    """Describe why a run found no room: what it needs, and what is free on each node."""
    groups = f"{plural(demand.sizes[0], 'group', 'groups')} of {demand.tp} workers on one node"
    workers = plural(demand.sizes[0], "worker", "workers") if demand.tp == 1 else groups
    each = " and ".join(f"{number:g} {kind}" for kind, number in demand.per_worker.items())
    least = "at least " if len(demand.sizes) > 1 else ""
    here = "; ".join(
        f"{node.name}: "
        + ", ".join(f"{node.free.get(kind, 0):g} of {node.total.get(kind, 0):g} {kind}s" for kind in demand.per_worker)
        for node in nodes
    )
    return (
        f"The run needs {least}{workers}, each with {each}, but for {seconds:.0f} s the Ray cluster had no room for "
        f"them. Free now, on {plural(len(nodes), 'node', 'nodes')}: {here}. Add nodes, end other jobs there, or write "
        "a smaller dp, a min_dp to continue with fewer, or a longer resource_timeout."
    )


def _by_node(nodes: Sequence[Node], kind: str) -> str:
    if len(nodes) == 1:
        return ""
    return ": " + ", ".join(f"{node.total.get(kind, 0):g} on {node.name}" for node in nodes)
