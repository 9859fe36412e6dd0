"""What would make a run fit that does not: the smallest change of each kind, found by planning again."""

from __future__ import annotations

from dataclasses import replace

from tutorial_lib.theory.layouts import Cluster, Workload
from tutorial_lib.theory.plan import Candidate, plan

MOST_GPUS = 65_536


def remedies(workload: Workload, cluster: Cluster, engine: str = "deepspeed") -> list[str]:
    """What to write after which something fits: single changes, or if none is enough, one set; empty if nothing is."""

    def best(workload: Workload = workload, cluster: Cluster = cluster) -> Candidate | None:
        first = plan(workload, cluster, engine)[0]
        return first if first.fits else None

    found = []
    if workload.global_batch:
        step = workload.micro_batch * cluster.gpus
        rounded = -(-workload.global_batch // step) * step
        if rounded != workload.global_batch and best(replace(workload, global_batch=rounded)):
            found.append(f"--global-batch {rounded} instead of {workload.global_batch}")
    share = workload.micro_batch
    smaller = next((b for b in _halves(share) if best(replace(workload, micro_batch=b))), None)
    if smaller:
        found.append(f"--micro-batch {smaller} instead of {share}")
    if not workload.checkpointing and best(replace(workload, checkpointing=True)):
        found.append("--activation-checkpointing, for a third more computing")
    if not workload.checkpointing and not found and best(replace(workload, checkpointing=True, micro_batch=1)):
        found.append("--activation-checkpointing and --micro-batch 1")
    if best(cluster=replace(cluster, host_memory=float("inf"))):
        tried = plan(workload, replace(cluster, host_memory=float("inf")), engine)
        needed = min(candidate.host for candidate in tried if candidate.fits)
        found.append(f"offload, with --host-memory {-(-needed // 1e9):.0f} (GB per node)")
    gpus = smallest_gpus(workload, cluster, engine)
    if gpus and gpus > cluster.gpus:
        found.append(f"--gpus {gpus}, the fewest of this kind on which it fits")
    if not found:
        least = replace(workload, checkpointing=True, micro_batch=1, global_batch=None)
        if gpus := smallest_gpus(least, cluster, engine):
            found.append(f"--activation-checkpointing, --micro-batch 1 and --gpus {gpus} together")
    return found


def smallest_gpus(workload: Workload, cluster: Cluster, engine: str = "deepspeed") -> int | None:
    """The fewest devices on which something fits: any number within one node, whole nodes beyond; ``None``: none."""

    def fits(gpus: int) -> bool:
        return plan(workload, replace(cluster, gpus=gpus), engine)[0].fits

    for gpus in range(1, cluster.gpus_per_node + 1):
        if fits(gpus):
            return gpus
    too_few, nodes = 1, 2
    while not fits(nodes * cluster.gpus_per_node):
        too_few, nodes = nodes, 2 * nodes
        if nodes * cluster.gpus_per_node > MOST_GPUS:
            return None
    while nodes - too_few > 1:
        middle = (nodes + too_few) // 2
        if fits(middle * cluster.gpus_per_node):
            nodes = middle
        else:
            too_few = middle
    return nodes * cluster.gpus_per_node


def _halves(number: int) -> list[int]:
    """Half of the number, a quarter, ... down to 1."""
    halves = []
    while number > 1:
        number //= 2
        halves.append(number)
    return halves
