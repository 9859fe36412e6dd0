"""Which way to train a model on given devices: every layout with its memory, its traffic and its step time.

:func:`plan` costs the layouts of :mod:`tutorial_lib.theory.layouts`, finds which fit, and orders those by a step-time
model; the arithmetic of its parts is in the other pages.

The model of a step::

    computing  passes * 2 Psi tokens (and attention) / (devices * FLOP/s * efficiency)
    tp         all-reduces of activations; the next operation waits for them: nothing hides them
    dp         gradients and parameters; computing hides the share ``overlap`` of it, as far as it lasts
    offload    states over the host link, and Adam on the host's processors; nothing hides them

Left out: fragmentation of memory and what CUDA and NCCL take (``headroom`` stands for both), the latency of
collectives, kernels that are slower on smaller shards and micro-batches, the time of Adam on the device, and reading
data.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tutorial_lib.theory import flops, memory, traffic
from tutorial_lib.theory.dimensions import Dimensions
from tutorial_lib.theory.layouts import Cluster, Layout, Workload, check, layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout with its costs: bytes per device (``host`` per node), bytes that a device sends per step, seconds.

    ``problem`` says why it cannot run; ``slower`` why it is not the best.
    """

    layout: Layout
    accumulation: int
    states: float
    activations: float
    buffers: float
    host: float
    dp_traffic: float
    tp_traffic: float
    compute_seconds: float
    dp_seconds: float
    tp_seconds: float
    offload_seconds: float
    exposed_dp_seconds: float
    problem: str = ""
    slower: str = ""

    @property
    def memory(self) -> float:
        return self.states + self.activations + self.buffers

    @property
    def fits(self) -> bool:
        return not self.problem

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.tp_seconds + self.exposed_dp_seconds + self.offload_seconds


def plan(workload: Workload, cluster: Cluster, engine: str = "deepspeed") -> list[Candidate]:
    """All layouts: first those that fit, fastest first, then the others, smallest first.

    Of layouts that are equally fast the one that divides least comes first: it runs the fewest collectives, whose
    latency the model leaves out.

    Raises:
        ValueError: an unknown engine or precision, a number below its smallest value, or half-used nodes.
    """
    check(workload, cluster, engine)
    candidates = [_candidate(workload, cluster, layout) for layout in layouts(workload, cluster, engine)]
    fitting = sorted((c for c in candidates if c.fits), key=_order)
    others = sorted((c for c in candidates if not c.fits), key=lambda c: (c.memory, c.host))
    return [dataclasses.replace(c, slower=_why_slower(c, fitting[0])) for c in fitting] + others


def backward_all_reduces(dimensions: Dimensions, engine: str) -> int:
    """All-reduces per layer in backward under tensor parallelism: AutoTP sums once per column-parallel projection.

    This course's DTensor plan, which goes with FSDP2, sums once per attention and MLP, as Megatron does.
    """
    return 2 if engine == "fsdp" else dimensions.column_layers


def _order(candidate: Candidate) -> tuple[float, int, int]:
    # Rounding: sums of the same terms must not be told apart by their last bits.
    return float(f"{candidate.seconds:.6g}"), candidate.layout.tp, candidate.layout.zero_stage


def _candidate(workload: Workload, cluster: Cluster, layout: Layout) -> Candidate:
    dims, element = workload.dimensions, workload.bytes_per_element
    params = memory.tensor_parallel_params(workload.num_params, dims.replicated_params, layout.tp)
    share = workload.micro_batch * layout.dp
    global_batch = workload.global_batch or workload.micro_batch * cluster.gpus
    accumulation = max(1, global_batch // share)
    per_node = min(cluster.gpus, cluster.gpus_per_node)
    states, host = _states(workload, layout, params, accumulation, per_node)
    activations = memory.activation_bytes(
        dims.layers, workload.seq_length, workload.micro_batch, dims.hidden, dims.heads, dims.vocabulary, layout.tp,
        checkpointing=workload.checkpointing, bytes_per_element=element,
    )  # fmt: skip
    buffers = _buffers(workload, layout, params)

    per_dp_bytes, dp_seconds = _dp_traffic(workload, cluster, layout, params, accumulation)
    tensor = traffic.tensor_parallel_volume(
        dims.layers, workload.micro_batch, workload.seq_length, dims.hidden, layout.tp, accumulation=accumulation,
        recompute=workload.checkpointing,
        column_layers=backward_all_reduces(dims, "fsdp" if layout.strategy else "deepspeed"),
    )  # fmt: skip
    tp_bytes = tensor.ring_elements(layout.tp) * element
    tokens = global_batch * workload.seq_length
    compute = _compute_seconds(workload, cluster, layout, tokens)
    return Candidate(
        layout=layout, accumulation=accumulation, states=states, activations=activations, buffers=buffers,
        host=host * per_node, dp_traffic=per_dp_bytes, tp_traffic=tp_bytes, compute_seconds=compute,
        dp_seconds=dp_seconds, tp_seconds=tp_bytes / cluster.within,
        offload_seconds=_offload_seconds(workload, cluster, layout, params, accumulation, per_node),
        exposed_dp_seconds=dp_seconds - cluster.overlap * min(dp_seconds, compute),
        problem=_problem(cluster, states + activations + buffers, host * per_node, global_batch, share),
    )  # fmt: skip


def _states(workload: Workload, layout: Layout, params: int, accumulation: int, per_node: int) -> tuple[float, float]:
    """Bytes of model states on a device, and on the host for each of its devices."""
    ranks = _shards(layout, per_node)
    if layout.strategy:
        # FSDP2 shards fp32 weights, gradients and moments; computing casts what it gathers. Without resharding after
        # forward the gathered weights stay, which counts as buffers. Gradients are reduced once per step: until the
        # last micro-batch they wait whole on the device.
        whole = memory.model_states(params, 3, ranks, memory.FP32).total
        waiting = 4 * params if accumulation > 1 and ranks > 1 else 0
        return (waiting, whole) if layout.offload == "all" else (whole + waiting, 0)
    precision = memory.MIXED
    if workload.precision == "fp32":
        precision = memory.DEEPSPEED_FP32 if layout.zero_stage else memory.FP32
    device = memory.device_states(params, layout.zero_stage, ranks, precision, layout.offload)
    host = memory.host_states(params, layout.zero_stage, ranks, precision, layout.offload)
    total = device.total
    if layout.zero_stage == 1 and accumulation == 1:
        # Reduced at once, as at stage 2: whole gradients wait between micro-batches alone (measured in the course).
        total -= device.gradients - memory.model_states(params, 2, ranks, precision).gradients
    return total, host.total


def _shards(layout: Layout, per_node: int) -> int:
    return per_node // layout.tp if layout.strategy == "hybrid" else layout.dp


def _buffers(workload: Workload, layout: Layout, params: int) -> float:
    """What an engine allocates beside the states: buckets, and layers that are gathered at the moment."""
    dims, element = workload.dimensions, workload.bytes_per_element
    bucket = min(params, workload.bucket_size)
    if layout.strategy is None:
        if layout.dp == 1 and layout.offload != "all":
            return 0
        # Stage 0 flattens gradients into one bucket; stages 1 and 2 have another for updated parameters; stage 3
        # keeps gathered parameters up to its limit.
        second = {0: 0, 1: bucket, 2: bucket, 3: min(params, workload.live_params)}[layout.zero_stage]
        return (bucket + second) * element
    # Two units gathered, one computing and one coming, and the gradient of one on its way.
    unit = max(dims.layer_params // layout.tp, dims.embedding_params)
    gathered = params + unit if layout.strategy == "shard_grad_op" else 3 * unit
    return gathered * element


def _dp_traffic(
    workload: Workload, cluster: Cluster, layout: Layout, params: int, accumulation: int
) -> tuple[float, float]:
    """Bytes that a device sends in its data-parallel group per step, and the seconds that takes."""
    element = workload.bytes_per_element
    # FSDP2 gathers 16-bit copies and reduces gradients in fp32.
    reduced = 4 if layout.strategy else element
    members = max(1, min(cluster.gpus, cluster.gpus_per_node) // layout.tp)

    def cost(volume: traffic.StepVolume, ranks: int, members: int) -> tuple[float, float]:
        gathers = traffic.StepVolume(all_gather=volume.all_gather)
        reductions = traffic.StepVolume(all_reduce=volume.all_reduce, reduce_scatter=volume.reduce_scatter)
        sent = gathers.ring_elements(ranks) * element + reductions.ring_elements(ranks) * reduced
        return sent, sent / traffic.bus_bandwidth(members, ranks, cluster.within, cluster.between)

    if layout.strategy is None:
        volume = traffic.zero_volume(
            params, layout.zero_stage, accumulation=accumulation, gradient_reduction=workload.gradient_reduction,
            # A layer waits for its backward while up to 2 Psi elements of others are used; DeepSpeed keeps it that
            # long if its limit allows.
            parameters_stay=2 * params <= workload.live_params,
        )  # fmt: skip
        return cost(volume, layout.dp, members)
    if layout.strategy != "hybrid":
        return cost(traffic.fsdp_volume(params, layout.strategy, accumulation=accumulation), layout.dp, members)
    inside = cost(traffic.fsdp_volume(params, "full_shard", accumulation=accumulation), members, members)
    shard = memory.partition_elements(params, members)
    across = cost(traffic.StepVolume(all_reduce=shard), layout.dp // members, 1)
    # One layer's gradients cross the network while the next layer is gathered inside: the links differ.
    return inside[0] + across[0], max(inside[1], across[1])


def _compute_seconds(workload: Workload, cluster: Cluster, layout: Layout, tokens: int) -> float:
    """Forward and backward. Tied to the embedding, the output layer is whole on every rank, and so is its work."""
    dims = workload.dimensions
    per_token = flops.flops_per_token(workload.num_params, dims.layers, dims.hidden, workload.seq_length)
    if not dims.tied:
        per_token -= 6 * dims.embedding_params  # looked up, never multiplied
    whole = 6 * dims.vocabulary * dims.hidden if dims.tied else 0
    passes = flops.WITH_RECOMPUTE / flops.FORWARD_BACKWARD if workload.checkpointing else 1.0
    work = passes * tokens / layout.dp * ((per_token - whole) / layout.tp + whole)
    return work / (cluster.gpu_flops * cluster.efficiency)


def _offload_seconds(
    workload: Workload, cluster: Cluster, layout: Layout, params: int, accumulation: int, per_node: int
) -> float:
    """Gradients down, parameters up, Adam in between; with ``all``, parameters up for each forward and backward."""
    if layout.offload == "none":
        return 0.0
    shard = memory.partition_elements(params, _shards(layout, per_node))
    reductions = 1 if layout.zero_stage == 1 else accumulation
    fetches = 2 * accumulation if layout.offload == "all" else 1
    link = (reductions + fetches) * shard * workload.bytes_per_element / cluster.host_link
    return link + shard * per_node / cluster.host_adam


def _problem(cluster: Cluster, device: float, host: float, global_batch: int, share: int) -> str:
    if global_batch % share:
        return f"global batch: not n x {share}"
    if device > cluster.usable_memory:
        return f"does not fit by {_gb(device - cluster.usable_memory)} GB"
    if host > cluster.host_memory:
        return f"host too small by {_gb(host - cluster.host_memory)} GB"
    return ""


def _why_slower(candidate: Candidate, best: Candidate) -> str:
    if candidate is best:
        return ""
    more = {
        "computing": candidate.compute_seconds - best.compute_seconds,
        "tp traffic": candidate.tp_seconds - best.tp_seconds,
        "dp traffic": candidate.exposed_dp_seconds - best.exposed_dp_seconds,
        "offload": candidate.offload_seconds - best.offload_seconds,
    }
    cause = max(more, key=lambda name: more[name])
    percent = 100 * (candidate.seconds / best.seconds - 1)
    if percent < 0.05:
        return "as fast; holds more memory" if candidate.memory > best.memory else "as fast; divides more"
    return f"{percent:,.{1 if percent < 100 else 0}f} % slower: {cause}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2g}"
