"""Search space of the planner: the layouts that :func:`tutorial_lib.theory.plan.plan` considers.

A *shape* is an arrangement of devices and a sharding of the states; for each shape, the micro-batch, activation
checkpointing and gradient reduction vary. The search leaves out the following, because another layout is better or
nobody trains this way:

- tensor parallelism across nodes, and sizes that do not divide the heads;
- context parallelism below 32,768 tokens, or if its group together with tp exceeds a node;
- a pipeline below 100 B parameters or 64 devices, and any pipeline with more sharding than ZeRO-1 or FSDP2 without
  resharding, because it would gather or reduce again for every micro-batch;
- offload together with context parallelism or a pipeline;
- hybrid groups that are smaller than a node or larger than 16 nodes;
- micro-batches that are above 64 or not a power of two, unless one is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from tutorial_lib.theory import memory
from tutorial_lib.theory.activations import CHECKPOINTING
from tutorial_lib.theory.layouts import FSDP_STRATEGIES, Cluster, Layout, Workload

LONG_SEQUENCE = 32_768
LARGE_MODEL = 100e9
MANY_GPUS = 64
SPLITS = (2, 4, 8, 16)
"""Sizes of context parallelism, and numbers of pipeline stages."""
LARGEST_MICRO_BATCH = 64
MICRO_BATCHES_PER_STAGE = 4
"""Micro-batches per stage and step, for a pipeline, if no global batch is given."""


def candidate_layouts(workload: Workload, cluster: Cluster, engine: str = "deepspeed") -> list[Layout]:
    """Return the shapes to consider. Their micro-batch of 1 is a placeholder, which :func:`variants` replaces."""
    found = []
    for tp, sequence_parallel in _tensor_parallel(workload, cluster, engine):
        for split in _context_and_pipeline_sizes(workload, cluster, tp, engine):
            cp, pp = split.get("cp", 1), split.get("pp", 1)
            axes = {"dp": cluster.gpus // (tp * cp * pp), "tp": tp, "sequence_parallel": sequence_parallel, **split}
            found += _sharded(axes, cluster, engine)
    return found


def variants(shape: Layout, workload: Workload) -> Iterator[list[Layout]]:
    """Yield, for each kind of checkpointing and gradient reduction, the layouts with increasing micro-batches."""
    recompute = [workload.checkpointing] if workload.checkpointing else list(CHECKPOINTING)
    sizes = micro_batches(shape, workload)
    reductions = ["last"]
    accumulates = workload.global_batch is not None or workload.micro_batch is not None
    if shape.strategy not in (None, "no_shard") and shape.pp == 1 and accumulates:
        reductions = ["each", "last"]
    for checkpointing, reduction in itertools.product(recompute, reductions):
        yield [replace(shape, micro_batch=b, checkpointing=checkpointing, reduction=reduction) for b in sizes]


def smallest_variants(shape: Layout, workload: Workload) -> Iterator[Layout]:
    """Yield the variants of a shape that need the least memory: most recomputation, smallest micro-batch."""
    found = [sizes[0] for sizes in variants(shape, workload)]
    most = max(CHECKPOINTING.index(layout.checkpointing) for layout in found)
    yield from (layout for layout in found if layout.checkpointing == CHECKPOINTING[most])


def micro_batches(shape: Layout, workload: Workload) -> list[int]:
    """Return the micro-batches to try, smallest first; with a given global batch, those that divide a rank's share."""
    if workload.micro_batch:
        return [workload.micro_batch]
    sizes = [1 << n for n in range(LARGEST_MICRO_BATCH.bit_length())]
    if workload.global_batch is None:
        return sizes
    share = workload.global_batch // shape.dp
    return [b for b in sizes if share and share % b == 0] or [1]


def step_batch(workload: Workload, cluster: Cluster, layout: Layout) -> int:
    """Return the number of sequences per optimizer step."""
    if workload.global_batch:
        return workload.global_batch
    if workload.micro_batch:
        return workload.micro_batch * cluster.gpus
    return layout.micro_batch * layout.dp * (MICRO_BATCHES_PER_STAGE * layout.pp if layout.pp > 1 else 1)


def _tensor_parallel(workload: Workload, cluster: Cluster, engine: str) -> Iterator[tuple[int, bool]]:
    """Yield tensor-parallel sizes within a node; for FSDP2 also with sequence parallelism, which AutoTP lacks."""
    dims, per_node = workload.dimensions, cluster.per_node
    for tp in range(1, per_node + 1):
        if per_node % tp or dims.heads % tp or dims.key_value_heads % tp:
            continue
        yield tp, False
        if tp > 1 and engine == "fsdp" and workload.allow_missing and workload.seq_length % tp == 0:
            yield tp, True


def _context_and_pipeline_sizes(workload: Workload, cluster: Cluster, tp: int, engine: str) -> Iterator[dict[str, int]]:
    """Yield sizes of context parallelism (ring or Ulysses) and of pipelines, starting with neither of them."""
    yield {}
    if not workload.allow_missing:
        return
    groups = cluster.gpus // tp
    if workload.seq_length >= LONG_SEQUENCE:
        for cp in SPLITS:
            if tp * cp > cluster.per_node or groups % cp:
                continue
            if engine == "fsdp":
                yield {"cp": cp}
            if workload.dimensions.heads % (tp * cp) == 0:
                yield {"cp": cp, "ulysses": True}
    if workload.num_params >= LARGE_MODEL and cluster.gpus >= MANY_GPUS:
        for pp in SPLITS:
            if groups % pp == 0 and pp <= workload.dimensions.layers:
                yield {"pp": pp}
                if workload.dimensions.layers >= 2 * pp:
                    yield {"pp": pp, "chunks": 2}


def _sharded(axes: dict[str, int], cluster: Cluster, engine: str) -> list[Layout]:
    cp, pp = axes.get("cp", 1), axes.get("pp", 1)
    plain, shards = cp == pp == 1, axes["dp"] * cp
    if engine == "fsdp":
        return list(_fsdp(axes, cluster, shards, plain))
    found = []
    for stage in memory.STAGES:
        if pp > 1 and stage > 1:
            continue
        for offload in memory.OFFLOADS[: {0: 1, 3: 3}.get(stage, 2)] if plain else ("none",):
            if shards > 1 or stage == 0 or offload != "none":
                found.append(Layout(zero_stage=stage, offload=offload, **axes))  # type: ignore[arg-type]
    return found


def _fsdp(axes: dict[str, int], cluster: Cluster, shards: int, plain: bool) -> Iterator[Layout]:
    """Yield FSDP2's strategies. With one rank there is nothing to shard, so shard_grad_op and hybrid are left out."""
    if axes.get("pp", 1) > 1:
        yield Layout(zero_stage=2, strategy="shard_grad_op", **axes)  # type: ignore[arg-type]
        return
    for strategy in FSDP_STRATEGIES:
        if strategy == "no_shard" and (axes["tp"] > 1 or axes.get("cp", 1) > 1):
            continue
        if strategy == "shard_grad_op" and shards == 1:
            continue
        stage = {"no_shard": 0, "shard_grad_op": 2}.get(strategy, 3)
        sizes: list[int | None] = [None]
        if strategy == "hybrid":
            node = max(1, cluster.per_node // axes["tp"])
            sizes = [node * nodes for nodes in (1, 2, 4, 8, 16) if 1 < node * nodes < shards and plain]
            sizes = [size for size in sizes if size and shards % size == 0]
        for size in sizes:
            for offload in ("none", "all") if plain and strategy != "no_shard" else ("none",):
                yield Layout(zero_stage=stage, strategy=strategy, shard_size=size, offload=offload, **axes)  # type: ignore[arg-type]
