"""Room on a Ray cluster: which nodes could hold the run's tensor-parallel groups, and what is missing, in words.

A tensor-parallel group (``tp`` workers that share every layer) lies on one node. So a node with 3 free CPUs has room
for one group of ``tp=2``, and its third CPU is of no use to the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tutorial_lib.config import Config, ConfigError


class ResourcesMissing(RuntimeError):
    """The cluster had no room for the run within the stated time. The message lists what it has, node by node."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive, with its resources (``CPU``, ``GPU``) in all and those that nobody has taken."""

    id: str
    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run wants.

    Attributes:
        per_worker: resources of one worker.
        tp: workers of a tensor-parallel group.
        sizes: data-parallel sizes with which the run can go on, smallest first.
    """

    per_worker: Mapping[str, float]
    tp: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, config: Config) -> Demand:
        """Return what a configuration wants."""
        per_worker = {"CPU": 1.0, "GPU": 1.0} if config.run.device == "cuda" else {"CPU": 1.0}
        return cls(per_worker, config.parallel.tp, tuple(possible_sizes(config)))

    def groups_on(self, resources: Mapping[str, float]) -> int:
        """Return how many tensor-parallel groups these resources of one node hold."""
        return min(int(resources.get(kind, 0) // (each * self.tp)) for kind, each in self.per_worker.items())

    def largest_size(self, groups: int) -> int | None:
        """Return the largest data-parallel size that this many groups allow, or None if they are too few."""
        return max((size for size in self.sizes if size <= groups), default=None)


def possible_sizes(config: Config) -> list[int]:
    """Return the data-parallel sizes with which a run can go on: ``dp``, and with ``min_dp`` what lies between.

    A size is left out if the configuration cannot run with it, such as one that does not divide ``global_batch``.
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
    """Return the configuration for fewer data-parallel ranks: the same global batch, and no larger micro-batches.

    Raises:
        ConfigError: it cannot run with that many.
    """
    if dp == config.parallel.dp:
        return config
    flat = {"dp": dp, "min_dp": None}
    if config.run.global_batch % dp == 0:
        flat["micro_batch"] = math.gcd(config.run.global_batch // dp, config.micro_batch)
    return config.replaced(**flat)


def read_nodes() -> list[Node]:
    """Return the nodes of the cluster that are alive, as Ray's head knows them: some seconds late."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        Node(each["NodeID"], each["NodeManagerHostname"], each["Resources"], free.get(each["NodeID"], {}))
        for each in ray.nodes()
        if each["Alive"]
    ]


def check_room(demand: Demand, nodes: Sequence[Node]) -> None:
    """Refuse a run for which the cluster is too small even when nobody else uses it.

    Raises:
        ConfigError: says what is wanted, and what each node has.
    """
    if demand.largest_size(sum(demand.groups_on(node.total) for node in nodes)):
        return
    workers = demand.sizes[0] * demand.tp
    for kind, each in demand.per_worker.items():
        offered = sum(node.total.get(kind, 0) for node in nodes)
        if offered < each * workers:
            raise ConfigError(
                f"{workers} workers need {each * workers:g} {kind}s, and the Ray cluster has {offered:g}"
                f"{_by_node(nodes, kind)}. Write a smaller dp"
                + (", or device='cpu'." if kind == "GPU" else ", or add nodes to the cluster.")
            )
    kind = "GPU" if "GPU" in demand.per_worker else "CPU"
    groups = _count(demand.sizes[0], "group")
    raise ConfigError(
        f"The {demand.tp} workers of a tensor-parallel group share a node, and the Ray cluster has too few nodes with "
        f"{demand.tp} {kind}s for {groups}{_by_node(nodes, kind)}. Write a smaller tp, or add larger nodes."
    )


def missing(demand: Demand, nodes: Sequence[Node], seconds: float) -> str:
    """Return what a run has waited for in vain: what it wants, and what is free on each node."""
    groups = f"{_count(demand.sizes[0], 'group')} of {demand.tp} workers on one node"
    workers = _count(demand.sizes[0], "worker") if demand.tp == 1 else groups
    each = " and ".join(f"{number:g} {kind}" for kind, number in demand.per_worker.items())
    least = "at least " if len(demand.sizes) > 1 else ""
    here = "; ".join(
        f"{node.name}: "
        + ", ".join(f"{node.free.get(kind, 0):g} of {node.total.get(kind, 0):g} {kind}s" for kind in demand.per_worker)
        for node in nodes
    )
    return (
        f"The run wants {least}{workers}, each with {each}, and for {seconds:.0f} s the Ray cluster had no room for "
        f"them. Free are now, on {_count(len(nodes), 'node')}: {here}. Add nodes, end what runs there, or write a "
        "smaller dp, a min_dp to go on with fewer, or a longer resource_timeout."
    )


def _by_node(nodes: Sequence[Node], kind: str) -> str:
    if len(nodes) == 1:
        return ""
    return ": " + ", ".join(f"{node.total.get(kind, 0):g} on {node.name}" for node in nodes)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
