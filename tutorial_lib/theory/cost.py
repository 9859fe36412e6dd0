"""Cost of a layout: bytes per device, bytes sent, and seconds per step.

The model of a step::

    compute    FLOPs (with recomputation) / (devices * peak * efficiency), plus the pipeline's bubble; attention without
               a fused kernel also moves its scores through the device's memory
    launches   time to launch the kernels, minus compute and tp, if positive (:mod:`tutorial_lib.theory.launches`)
    tp         all-reduces of activations; the next operation waits for them, so nothing hides them
    dp         gradients and parameters; the longer of compute and launches hides ``overlap`` times the shorter of its
               own time and theirs
    cp         keys and values around a ring, hidden the same way; or Ulysses' all-to-alls, which nothing hides
    update     Adam reads and writes 28 bytes per trained parameter of its shard
    offload    gradients and parameters over the host link, and Adam on the host's processors; nothing hides them. This
               is too optimistic: the one published run was :data:`OFFLOADED_RUN` times slower

Sources: FLOPs, arXiv:2204.02311, appendix B; volumes, :mod:`tutorial_lib.theory.traffic`; the update, AdamW's fp32
gradient, weight and two moments (16 bytes read, 12 written). Assumptions: Adam reaches four fifths of the memory
bandwidth (plausible); kernels are as efficient on small micro-batches as on large ones.
Not modelled: latency of collectives, sends between a pipeline's stages, reading data.
Checked: against published runs and our own, in docs/planner-errors.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from tutorial_lib.theory import context, flops, memory, pipeline, traffic
from tutorial_lib.theory.activations import recomputed_share, score_traffic
from tutorial_lib.theory.dimensions import Dimensions
from tutorial_lib.theory.launches import launch_seconds
from tutorial_lib.theory.layouts import Cluster, Layout, Workload, missing_here
from tutorial_lib.theory.peak_memory import Part, part_of_model, peak_memory
from tutorial_lib.theory.search import step_batch
from tutorial_lib.theory.state_bytes import layout_states, lora_params

UPDATE_BYTES = 28
OFFLOADED_RUN = 2.7
"""Factor by which the one published run with offload was slower than predicted here (docs/planner-errors.md)."""
SLOWEST_SMALL_RUN = 4
"""Largest factor, rounded up, by which a run of a model below 1 B parameters was slower than predicted."""
REACHED_MEMORY_BANDWIDTH = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout with its costs: bytes per device (``host`` per node), bytes that a device sends per step, and seconds.

    ``states`` are all model states of a step. ``memory`` is the peak, which may come in a phase (``peak_phase``)
    in which gradients do not exist yet. ``problem`` says why the layout cannot run, ``missing`` lists features that
    this course's engines lack for it, and ``slower`` says why it is not the best.
    """

    layout: Layout
    accumulation: int
    tokens: int
    states: float
    activations: float
    buffers: float
    memory: float
    peak_phase: str
    host: float
    dp_traffic: float
    tp_traffic: float
    cp_traffic: float
    compute_seconds: float
    launch_wait_seconds: float
    dp_seconds: float
    tp_seconds: float
    offload_seconds: float
    update_seconds: float
    exposed_dp_seconds: float
    tokens_per_gpu_second: float
    problem: str = ""
    missing: tuple[str, ...] = ()
    slower: str = ""

    @property
    def fits(self) -> bool:
        return not self.problem

    @property
    def seconds(self) -> float:
        return (
            self.compute_seconds + self.launch_wait_seconds + self.tp_seconds + self.exposed_dp_seconds
            + self.offload_seconds + self.update_seconds
        )  # fmt: skip


def backward_all_reduces(dimensions: Dimensions, engine: str) -> int:
    """Return the number of all-reduces per layer in backward with tensor parallelism.

    AutoTP sums once per column-parallel projection. This course's DTensor plan for FSDP2 sums once per attention or
    MLP block, as Megatron does.
    """
    return 2 if engine == "fsdp" else dimensions.column_layers


def evaluate(workload: Workload, cluster: Cluster, layout: Layout) -> Candidate:
    """Compute a layout's costs."""
    dims = workload.dimensions
    part = part_of_model(
        dims, workload.num_params, layout.tp, layout.pp, engine=layout.engine,
        sequence_parallel=layout.sequence_parallel,
    )  # fmt: skip
    batch = step_batch(workload, cluster, layout)
    share = layout.micro_batch * layout.dp
    accumulation = max(1, batch // share)
    states = layout_states(workload, layout, part.params, accumulation, _ranks_per_copy(layout))
    peak = peak_memory(workload, layout, part, states, accumulation)
    host = states.host * cluster.per_node

    dp_bytes, dp_seconds = _dp_traffic(workload, cluster, layout, part.params, accumulation)
    tp_bytes, tp_seconds = _tp_traffic(workload, cluster, layout, part, accumulation)
    cp_bytes, cp_seconds = _cp_traffic(workload, cluster, layout, part, accumulation)
    compute = _compute_seconds(workload, cluster, layout, batch * workload.seq_length)
    launches = launch_seconds(layout, part.layers, accumulation)
    if layout.pp > 1:
        slow_down = 1 + pipeline.bubble_share(layout.pp, accumulation, layout.chunks)
        compute, launches, tp_seconds = compute * slow_down, launches * slow_down, tp_seconds * slow_down
    waits = cp_seconds if layout.ulysses else 0.0
    hideable = dp_seconds + cp_seconds - waits
    exposed = waits + hideable - cluster.overlap * min(hideable, max(compute, launches))
    offload, update = _update_seconds(workload, cluster, layout, part.params, accumulation)
    wait = max(0.0, launches - compute - tp_seconds)
    seconds = compute + wait + tp_seconds + exposed + offload + update
    return Candidate(
        layout=layout, accumulation=accumulation, tokens=batch * workload.seq_length, states=states.device,
        activations=peak.activations, buffers=peak.buffers, memory=peak.total, peak_phase=peak.phase, host=host,
        dp_traffic=dp_bytes, tp_traffic=tp_bytes, cp_traffic=cp_bytes, compute_seconds=compute,
        launch_wait_seconds=wait, dp_seconds=dp_seconds, tp_seconds=tp_seconds,
        offload_seconds=offload, update_seconds=update, exposed_dp_seconds=exposed,
        tokens_per_gpu_second=batch * workload.seq_length / seconds / cluster.gpus,
        problem=_problem(cluster, peak.total, host, batch, share),
        missing=tuple(missing_here(layout, workload)),
    )  # fmt: skip


def _ranks_per_copy(layout: Layout) -> int:
    """Return the number of ranks that share one copy of the states."""
    return layout.shard_size or layout.dp * layout.cp


def _dp_traffic(
    workload: Workload, cluster: Cluster, layout: Layout, params: int, accumulation: int
) -> tuple[float, float]:
    """Return the bytes that a device sends in its data-parallel group per step, and the seconds that this takes."""
    element = workload.bytes_per_element
    # FSDP2 gathers 16-bit copies and reduces gradients in fp32.
    reduced = 4 if layout.strategy else element
    ranks = layout.dp * layout.cp
    members = max(1, cluster.per_node // layout.tp)
    trained = params
    if workload.lora_rank:
        trained = min(params, lora_params(workload.dimensions, workload.lora_rank) // (layout.tp * layout.pp))
    if layout.pp > 1:
        accumulation = 1  # gather once, reduce once: see :mod:`tutorial_lib.theory.search`

    def cost(volume: traffic.StepVolume, ranks: int, members: int) -> tuple[float, float]:
        gathers = traffic.StepVolume(all_gather=volume.all_gather)
        reductions = traffic.StepVolume(all_reduce=volume.all_reduce, reduce_scatter=volume.reduce_scatter)
        sent = gathers.ring_elements(ranks) * element + reductions.ring_elements(ranks) * reduced
        links = cluster.intra_node_bandwidth, cluster.inter_node_bandwidth
        return sent, sent / traffic.bus_bandwidth(members, ranks, *links)

    if layout.strategy is None:
        # Between a layer's forward and its backward, other layers use up to 2 Psi elements. DeepSpeed keeps the layer
        # gathered for that long if its limit allows.
        stays = 2 * params <= workload.live_params
        volume = traffic.zero_volume(
            trained, layout.zero_stage, accumulation=accumulation, gradient_reduction=workload.gradient_reduction,
            parameters_stay=stays,
        )  # fmt: skip
        frozen = (params - trained) * accumulation * (1 if stays else 2) if layout.zero_stage == 3 else 0
        with_frozen = traffic.StepVolume(volume.all_reduce, volume.all_gather + frozen, volume.reduce_scatter)
        return cost(with_frozen, ranks, members)
    shared = {"accumulation": accumulation, "frozen": params - trained, "reduce_each": layout.reduction == "each"}
    if layout.strategy != "hybrid":
        return cost(traffic.fsdp_volume(params, layout.strategy, **shared), ranks, members)  # type: ignore[arg-type]
    size = layout.shard_size or members
    inside = cost(traffic.fsdp_volume(params, "full_shard", **shared), size, members)  # type: ignore[arg-type]
    times = accumulation if layout.reduction == "each" else 1
    across = cost(
        traffic.StepVolume(all_reduce=times * memory.partition_elements(trained, size)), ranks // size, 1
    )  # fmt: skip
    # One layer's gradients cross the network while the next layer is gathered within a node. These two use different
    # links, unless the group itself spans nodes.
    seconds = max(inside[1], across[1]) if size <= members else inside[1] + across[1]
    return inside[0] + across[0], seconds


def _tp_traffic(
    workload: Workload, cluster: Cluster, layout: Layout, part: Part, accumulation: int
) -> tuple[float, float]:
    """Return the bytes and the seconds of the all-reduces of activations.

    With sequence parallelism they are all-gathers and reduce-scatters of the same volume.
    """
    tensor = traffic.tensor_parallel_volume(
        part.layers, layout.micro_batch, workload.seq_length // layout.cp, workload.dimensions.hidden, layout.tp,
        accumulation=accumulation, recompute=layout.checkpointing != "none",
        column_layers=backward_all_reduces(workload.dimensions, layout.engine),
    )  # fmt: skip
    sent = tensor.ring_elements(layout.tp) * workload.bytes_per_element
    return sent, sent / cluster.intra_node_bandwidth


def _cp_traffic(
    workload: Workload, cluster: Cluster, layout: Layout, part: Part, accumulation: int
) -> tuple[float, float]:
    if layout.cp == 1:
        return 0.0, 0.0
    tokens = layout.micro_batch * workload.seq_length / layout.cp
    dims = workload.dimensions
    if layout.ulysses:
        heads = max(dims.key_value_heads, layout.tp * layout.cp)  # copied if there are fewer heads than ranks
        elements = context.ulysses_elements(
            tokens, dims.hidden // layout.tp, dims.hidden // dims.heads * heads // layout.tp, layout.cp,
            recompute=layout.checkpointing != "none",
        )  # fmt: skip
    else:
        width = dims.key_value_width // layout.tp
        elements = context.ring_elements(tokens, width, layout.cp, recompute=layout.checkpointing == "full")
    sent = accumulation * part.layers * elements * workload.bytes_per_element
    return sent, sent / cluster.intra_node_bandwidth


def _compute_seconds(workload: Workload, cluster: Cluster, layout: Layout, tokens: int) -> float:
    """Return the seconds of forward, backward and recomputation. Every tp rank computes an unsplit output layer."""
    dims = workload.dimensions
    per_token: float = flops.flops_per_token(workload.num_params, dims.layers, dims.hidden, workload.seq_length)
    scale = workload.num_params / dims.num_params  # a size may differ a little from that of its dimensions
    if not dims.tied:
        per_token -= 6 * scale * dims.embedding_params  # looked up, never multiplied
    in_layers = 2 * scale * dims.layers * dims.layer_params
    if workload.lora_rank:
        per_token -= in_layers  # with frozen weights, backward computes no weight gradients
    is_unsplit = (dims.tied or layout.engine == "fsdp") and not layout.sequence_parallel
    unsplit = 6 * dims.vocabulary * dims.hidden if is_unsplit else 0
    products, attention = recomputed_share(dims, layout.checkpointing)
    per_token += products * in_layers + attention * 4 * dims.layers * dims.hidden * workload.seq_length
    tokens_here = tokens / (layout.dp * layout.cp * layout.pp)
    work = tokens_here * ((per_token - unsplit) / layout.tp + unsplit)
    scores = score_traffic(dims, workload.seq_length, layout.checkpointing, workload.bytes_per_element)
    moved = tokens_here * dims.layers * scores / layout.tp
    return work / (cluster.gpu_flops * cluster.efficiency) + moved / (
        REACHED_MEMORY_BANDWIDTH * cluster.memory_bandwidth
    )


def _update_seconds(
    workload: Workload, cluster: Cluster, layout: Layout, params: int, accumulation: int
) -> tuple[float, float]:
    """Return the seconds that offload adds, and the seconds of Adam on the device. One of them is 0."""
    trained = params
    if workload.lora_rank:
        trained = min(params, lora_params(workload.dimensions, workload.lora_rank) // (layout.tp * layout.pp))
    is_replicated = layout.strategy == "no_shard" or (layout.strategy is None and layout.zero_stage == 0)
    ranks = 1 if is_replicated else _ranks_per_copy(layout)
    shard = memory.partition_elements(trained, ranks)
    if layout.offload == "none":
        return 0.0, shard * UPDATE_BYTES / (REACHED_MEMORY_BANDWIDTH * cluster.memory_bandwidth)
    moved = _host_link_bytes(workload, layout, shard, memory.partition_elements(params, ranks), accumulation)
    return moved / cluster.host_link + shard * cluster.per_node / cluster.host_adam, 0.0


def _host_link_bytes(workload: Workload, layout: Layout, trained: int, all_params: int, accumulation: int) -> float:
    """Return the bytes of a rank's shard that cross its host link per step: gradients down, parameters up.

    FSDP2 keeps fp32 shards on the host, moves them unchanged for each gather and casts them on the device
    (``all_gather_inputs`` of ``_fsdp_param.py``); reduced gradients go down in fp32 (``_fsdp_collectives.py``).
    DeepSpeed sends 16-bit parameters up, and gradients down in fp32, which its host Adam reads. Stage 3 also keeps
    every micro-batch's 16-bit gradients in a buffer on the host, and fetches them back (``partition_grads``).

    Args:
        workload: the training to run.
        layout: how it is laid out.
        trained: elements of the shard that have gradients.
        all_params: elements of the shard, including frozen ones.
        accumulation: micro-batches per step.
    """
    element = workload.bytes_per_element
    if layout.strategy:
        reductions = 1 if layout.reduction == "last" else accumulation
        gathers = accumulation * (1 if layout.strategy == "shard_grad_op" else 2)
        stored = element if workload.lora_rank else 4  # a frozen base is stored in 16 bits
        return 4 * reductions * trained + stored * gathers * all_params
    down = 4 * trained * (accumulation if layout.zero_stage == 2 else 1)
    if layout.zero_stage == 3:
        down += 2 * element * accumulation * trained
    up = 2 * accumulation * all_params if layout.offload == "all" else trained
    return down + element * up


def _problem(cluster: Cluster, device: float, host: float, batch: int, share: int) -> str:
    if batch % share:
        return f"global batch not divisible by {share}"
    if device > cluster.usable_memory:
        return f"too large by {short_gb(device - cluster.usable_memory)} GB"
    if host > cluster.host_memory:
        return f"host too small by {short_gb(host - cluster.host_memory)} GB"
    return ""


def short_gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2g}"
