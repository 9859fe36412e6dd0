"""Remedies for a run that does not fit: changes that were tried by planning again, fastest first."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from tutorial_lib.theory.cost import Candidate
from tutorial_lib.theory.layouts import Cluster, Workload
from tutorial_lib.theory.plan import TIE, plan, something_fits
from tutorial_lib.theory.search import SPLITS

MOST_GPUS = 65_536
LORA_RANK = 16
LOSS_CHUNKS = 8
"""Default number of chunks of torchtune's chunked cross-entropy (``CEWithChunkedOutputLoss``)."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change after which something fits.

    Args:
        change: description of the change, usually with the options to write on the command line.
        best: the best layout after the change.
    """

    change: str
    best: Candidate


def remedies(workload: Workload, cluster: Cluster, engine: str = "deepspeed") -> list[Remedy]:
    """Return single changes or, if none is enough, one set of changes; empty if the planner knows none that helps."""
    found = _try_changes(workload, cluster, engine)
    if not found:
        least = replace(
            workload, checkpointing="full", micro_batch=1, global_batch=None, moments="8bit",
            loss_chunks=max(workload.loss_chunks, _loss_chunks(workload)), allow_missing=True,
        )  # fmt: skip
        if gpus := smallest_gpus(least, cluster, engine):
            best = plan(least, replace(cluster, gpus=gpus), engine)[0]
            change = "--activation-checkpointing full --micro-batch 1 --moments 8bit"
            change += f" --loss-chunks {least.loss_chunks} --gpus {gpus}"
            given = {"--global-batch": workload.global_batch, "--only-here": not workload.allow_missing}
            if dropped := " and ".join(flag for flag, is_given in given.items() if is_given):
                change += f" without {dropped}"
            found.append(Remedy(f"{change}, all together", best))
    return sorted(found, key=lambda remedy: -remedy.best.tokens_per_gpu_second)


def faster_than_offload(workload: Workload, cluster: Cluster, engine: str, best: Candidate) -> list[Remedy]:
    """Return single changes that avoid offload and make training faster, fastest first."""
    found = _try_changes(workload, replace(cluster, host_memory=1.0), engine)
    speed = best.tokens_per_gpu_second * (1 + TIE)
    faster = [r for r in found if r.best.layout.offload == "none" and r.best.tokens_per_gpu_second > speed]
    return sorted(faster, key=lambda remedy: -remedy.best.tokens_per_gpu_second)


def fewer_gpus(workload: Workload, cluster: Cluster, engine: str, best: Candidate) -> Remedy | None:
    """Return the fewest devices that are as fast as all, within :data:`TIE`; None if half of them are slower already.

    Fewer devices can be as fast if groups over several nodes wait for a slow network. The search halves the number of
    devices as long as all nodes stay full.
    """
    total = best.tokens_per_gpu_second * cluster.gpus
    found, gpus = None, cluster.gpus
    while gpus % 2 == 0 and (gpus // 2 <= cluster.gpus_per_node or gpus // 2 % cluster.gpus_per_node == 0):
        gpus //= 2
        fewer = plan(workload, replace(cluster, gpus=gpus), engine)[0]
        if not fewer.fits or fewer.tokens_per_gpu_second * gpus < (1 - TIE) * total:
            break
        found = Remedy(f"--gpus {gpus}", fewer)
        total = max(total, fewer.tokens_per_gpu_second * gpus)
    return found


def _try_changes(workload: Workload, cluster: Cluster, engine: str) -> list[Remedy]:
    return [
        Remedy(change, best)
        for change, changed, machine in _changes(workload, cluster, engine)
        if (best := plan(changed, machine, engine)[0]).fits
    ]


def _changes(workload: Workload, cluster: Cluster, engine: str) -> list[tuple[str, Workload, Cluster]]:
    """Return the single changes to try: a description, and the workload and cluster to plan."""
    found: list[tuple[str, Workload, Cluster]] = []

    def add(change: str, machine: Cluster = cluster, **changes: object) -> None:
        found.append((change, replace(workload, **changes), machine))  # type: ignore[arg-type]

    if workload.global_batch:
        step = (workload.micro_batch or 1) * cluster.gpus
        rounded = -(-workload.global_batch // step) * step
        if rounded != workload.global_batch:
            add(f"--global-batch {rounded} instead of {workload.global_batch}", global_batch=rounded)
    if not workload.allow_missing:
        add("layouts that this course's engines do not have", allow_missing=True)
    given = workload.micro_batch or 1
    for smaller in _halves(given):
        if something_fits(replace(workload, micro_batch=smaller), cluster, engine):
            add(f"--micro-batch {smaller} instead of {given}", micro_batch=smaller)
            break
    if workload.checkpointing in ("none", "selective"):
        add(f"--activation-checkpointing full instead of {workload.checkpointing}", checkpointing="full")
    if workload.loss_chunks == 1:
        add(f"--loss-chunks {_loss_chunks(workload)}", loss_chunks=_loss_chunks(workload))
    wider = "" if workload.allow_missing else " without --only-here"
    for moments in ("bf16", "8bit"):
        if workload.moments == "fp32":
            add(f"--moments {moments}{wider}", moments=moments, allow_missing=True)
    if not workload.lora_rank:
        rank = min(LORA_RANK, workload.dimensions.hidden)
        add(f"--lora {rank}{wider}", lora_rank=rank, allow_missing=True)
    if needed := _host_memory(workload, cluster, engine):
        add(f"offload, with --host-memory {needed / 1e9:.0f} (GB per node)", replace(cluster, host_memory=needed))
    fewest = smallest_gpus(workload, cluster, engine) or 0
    if fewest > cluster.gpus:
        add(f"--gpus {fewest}, the fewest of this kind on which it fits", replace(cluster, gpus=fewest))
    without = replace(cluster, host_memory=1.0)
    more = smallest_gpus(workload, without, engine) or 0
    if more > max(fewest, cluster.gpus):
        add(f"--gpus {more}, the fewest on which it fits without offload", replace(without, gpus=more))
    if larger := _gpu_memory(workload, cluster, engine):
        add(f"GPUs with --gpu-memory {larger / 1e9:.0f} (GB)", replace(without, gpu_memory=larger))
    return found


def smallest_gpus(workload: Workload, cluster: Cluster, engine: str = "deepspeed") -> int | None:
    """Return the fewest devices on which something fits: any number in one node, then full nodes; ``None`` if none."""

    def fits(gpus: int) -> bool:
        return something_fits(workload, replace(cluster, gpus=gpus), engine)

    for gpus in range(1, cluster.gpus_per_node + 1):
        if fits(gpus):
            return gpus
    if workload.global_batch:  # not every number of nodes can take equal shares of it
        return next((gpus for gpus in _gpus_for_batch(workload, cluster) if fits(gpus)), None)
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


def _gpus_for_batch(workload: Workload, cluster: Cluster) -> list[int]:
    """Return the numbers of devices in several full nodes that can take equal shares of the global batch."""
    per_node = cluster.gpus_per_node
    passes, rest = divmod(workload.global_batch or 0, workload.micro_batch or 1)
    if rest:
        return []
    ranks = [dp for dp in range(1, min(passes, MOST_GPUS) + 1) if passes % dp == 0]
    tensor = [tp for tp in range(1, per_node + 1) if per_node % tp == 0]
    splits = {math.prod(sizes) for sizes in itertools.product(tensor, (1, *SPLITS), (1, *SPLITS))}
    found = {dp * split for dp, split in itertools.product(ranks, splits)}
    return sorted(gpus for gpus in found if per_node < gpus <= MOST_GPUS and gpus % per_node == 0)


def _host_memory(workload: Workload, cluster: Cluster, engine: str) -> float | None:
    """Return the least host memory, in whole GB, with which something offloaded fits; None if more is no help."""
    endless = replace(cluster, host_memory=float("inf"))
    hosts = [candidate.host for candidate in plan(workload, endless, engine) if candidate.fits]
    needed = math.ceil(min(hosts) / 1e9) * 1e9 if hosts else 0.0
    return needed if needed > cluster.host_memory else None


def _gpu_memory(workload: Workload, cluster: Cluster, engine: str) -> float | None:
    """Return the least memory per GPU, in whole GB, in which something fits without offload; None if more is no help.

    Layouts whose passes do not divide the global batch do not count: they fit no GPU.
    """
    layouts = [c for c in plan(workload, cluster, engine) if c.layout.offload == "none"]
    peaks = [c.memory for c in layouts if not c.problem.startswith("global batch")]
    needed = math.ceil(min(peaks) / (1 - cluster.headroom) / 1e9) * 1e9 if peaks else 0.0
    return needed if needed > cluster.gpu_memory else None


def _loss_chunks(workload: Workload) -> int:
    """Return :data:`LOSS_CHUNKS`, or the number of tokens in a shorter sequence."""
    return min(LOSS_CHUNKS, workload.seq_length)


def _halves(number: int) -> list[int]:
    """Return half of the number, a quarter, ... down to 1."""
    halves = []
    while number > 1:
        number //= 2
        halves.append(number)
    return halves
