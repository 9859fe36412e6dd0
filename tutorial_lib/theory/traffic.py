"""Communication volume of one optimizer step, in elements that should cross the wire.

Volumes are in *elements per rank*, counted as in the ZeRO paper: an all-gather or a reduce-scatter of Psi elements
costs Psi, and an all-reduce costs 2 Psi (it is a reduce-scatter and an all-gather). The exact cost of a ring is
(n - 1) / n of that: :func:`ring_factor`.

Sources:
    ZeRO, arXiv:1910.02054, section 7 (2 Psi for stages 1 and 2, 3 Psi for stage 3)
    Megatron-LM, arXiv:1909.08053, section 3 (two all-reduces per layer and direction)
    Bandwidth optimal all-reduce algorithms, Patarasuk and Yuan, 2009 (ring factors)

Assumptions: rings, without latency. Checked: these equal the elements counted in real runs, in ``tests/distributed``
and lessons 01 to 03.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

GRADIENT_REDUCTIONS = ("reduce_scatter", "all_reduce")


@dataclass(frozen=True, slots=True)
class StepVolume:
    """Elements of the full logical tensors that each kind of collective carries in one optimizer step."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    @property
    def total(self) -> int:
        """Elements per rank: an all-reduce counts twice."""
        return 2 * self.all_reduce + self.all_gather + self.reduce_scatter

    def ring_elements(self, num_ranks: int) -> float:
        """Return the elements that each rank of a ring really sends: :attr:`total` times (n - 1) / n."""
        return (
            ring_factor("all_reduce", num_ranks) * self.all_reduce
            + ring_factor("all_gather", num_ranks) * self.all_gather
            + ring_factor("reduce_scatter", num_ranks) * self.reduce_scatter
        )

    def to_dict(self) -> dict[str, int]:
        """Return the elements by kind."""
        return asdict(self)


def zero_volume(
    num_params: int,
    stage: int,
    *,
    accumulation: int = 1,
    gradient_reduction: str = "reduce_scatter",
    parameters_stay: bool = False,
    persistent: int = 0,
    tied: int = 0,
) -> StepVolume:
    """Return the communication of one optimizer step under ZeRO (arXiv:1910.02054, section 7).

    ======= ==================================================================== ==================
    stage   per optimizer step                                                   GAS = 1
    ======= ==================================================================== ==================
    0       one all-reduce of the gradients                                      2 Psi
    1       reduce the gradients, all-gather the updated parameters              2 Psi
    2       the same, but gradients are reduced in every micro-batch             2 Psi
    3       all-gather for forward, again for backward, reduce-scatter, in       3 Psi
            every micro-batch
    ======= ==================================================================== ==================

    Args:
        num_params: Psi, the number of trained elements, with tied ones counted once.
        stage: 0 to 3.
        accumulation: micro-batches per optimizer step (GAS).
        gradient_reduction: how stages 1 and 2 reduce gradients. The paper's ``reduce_scatter`` costs Psi; DeepSpeed
            does an ``all_reduce`` for 2 Psi unless ``use_multi_rank_bucket_allreduce`` is false.
        parameters_stay: whether stage 3 keeps parameters gathered from forward to backward. This saves the second
            all-gather, so a micro-batch costs 2 Psi. DeepSpeed's defaults do that for a model below
            ``stage3_max_live_parameters`` whose layers are used again within ``stage3_max_reuse_distance``.
        persistent: elements of parameters that stage 3 keeps in full on every rank (up to
            ``stage3_param_persistence_threshold``). They are gathered once per step, after their update.
        tied: elements of parameters that a second module uses, too (tied embeddings). Stage 3 gathers them once per
            use if parameters do not stay.

    Raises:
        ValueError: an unknown stage or gradient reduction, or accumulation below 1.
    """
    if gradient_reduction not in GRADIENT_REDUCTIONS:
        raise ValueError(
            f"gradient_reduction is {gradient_reduction!r}. Write one of: {', '.join(GRADIENT_REDUCTIONS)}."
        )
    if accumulation < 1:
        raise ValueError(f"accumulation is {accumulation}; there is at least one micro-batch per step.")
    if stage == 0:
        return StepVolume(all_reduce=num_params)
    if stage in (1, 2):
        reduced = num_params * (accumulation if stage == 2 else 1)
        if gradient_reduction == "all_reduce":
            return StepVolume(all_reduce=reduced, all_gather=num_params)
        return StepVolume(reduce_scatter=reduced, all_gather=num_params)
    if stage == 3:
        gathered = num_params - persistent if parameters_stay else 2 * (num_params - persistent + tied)
        return StepVolume(
            all_gather=accumulation * gathered + persistent,
            reduce_scatter=accumulation * num_params,
        )
    raise ValueError(f"stage is {stage}; ZeRO has the stages 0, 1, 2 and 3.")


def fsdp_volume(
    num_params: int,
    sharding: str,
    *,
    shard_size: int | None = None,
    accumulation: int = 1,
    frozen: int = 0,
    reduce_each: bool = False,
) -> StepVolume:
    """Return the communication of one optimizer step under FSDP2.

    ============== ===================================================== =============
    sharding       per optimizer step                                    one
                                                                         micro-batch
    ============== ===================================================== =============
    no_shard       one all-reduce of the gradients (DDP)                 2 Psi
    shard_grad_op  one all-gather per micro-batch, one reduce-scatter    2 Psi
    full_shard     two all-gathers per micro-batch, one reduce-scatter   3 Psi
    hybrid_shard   the same within shard_size ranks, and an all-reduce   3 Psi and
                   of the shards, Psi / shard_size, among the copies     2 Psi / S
    ============== ===================================================== =============

    The table assumes that gradients are reduced once per step, as in this course's engine: full gradients wait in
    memory until the last micro-batch. FSDP2's default (``reduce_each``) reduces and shards them with every micro-batch,
    as ZeRO's stages 2 and 3 do. DDP reduces once (``no_sync``) in both cases.

    Args:
        num_params: Psi; tied parameters count once, because FSDP2 gathers a unit with all its parameters once.
        sharding: FSDP1's name of the strategy, in lower case.
        shard_size: S, for ``hybrid_shard``: number of ranks that share one copy.
        accumulation: micro-batches per optimizer step.
        frozen: elements of Psi that are gathered, but have no gradient.
        reduce_each: gradients are reduced with every micro-batch, rather than only with the last one.

    Raises:
        ValueError: an unknown sharding, or ``hybrid_shard`` without its size.
    """
    trained, times = num_params - frozen, accumulation if reduce_each else 1
    if sharding == "no_shard":
        return StepVolume(all_reduce=trained)
    if sharding == "shard_grad_op":
        return StepVolume(all_gather=accumulation * num_params, reduce_scatter=times * trained)
    if sharding == "full_shard":
        return StepVolume(all_gather=2 * accumulation * num_params, reduce_scatter=times * trained)
    if sharding == "hybrid_shard" and shard_size:
        return StepVolume(
            all_gather=2 * accumulation * num_params,
            reduce_scatter=times * trained,
            all_reduce=times * -(-trained // shard_size),
        )
    raise ValueError(
        f"sharding is {sharding!r} with shard_size={shard_size}. Write no_shard, shard_grad_op, full_shard, or "
        "hybrid_shard with its shard_size."
    )


def tensor_parallel_volume(
    num_layers: int,
    micro_batch: int,
    seq_length: int,
    hidden: int,
    tp: int,
    *,
    accumulation: int = 1,
    recompute: bool = False,
    column_layers: int = 2,
) -> StepVolume:
    """Return the communication of one optimizer step in a tensor-parallel group, except embedding and output layer.

    Each layer all-reduces ``b s h`` elements twice in forward (after attention, after the MLP) and twice in backward
    (arXiv:1909.08053, section 3). PyTorch's activation checkpointing, full or selective, repeats only the first
    all-reduce of forward: it stops recomputing at the last tensor that backward needs, which comes before the sum after
    the MLP.

    Args:
        num_layers: L, the number of layers.
        micro_batch: b, in sequences.
        seq_length: s, in tokens.
        hidden: h, the hidden size.
        tp: t, the tensor-parallel size; a single rank sends nothing.
        accumulation: micro-batches per optimizer step.
        recompute: whether PyTorch's activation checkpointing is on.
        column_layers: column-parallel projections per layer, each of which all-reduces the gradient of its own input.
            Megatron fuses them into 2; five separate ones (query, key, value, gate, up) cost 5.
    """
    if tp == 1:
        return StepVolume()
    all_reduces = 2 + column_layers + (1 if recompute else 0)
    return StepVolume(all_reduce=accumulation * num_layers * all_reduces * micro_batch * seq_length * hidden)


def tensor_parallel_crossover(num_params: int, num_layers: int, hidden: int, *, column_layers: int = 2) -> float:
    """Return the tokens per step at which tensor parallelism and ZeRO-3 send the same amount over n devices.

    A tensor-parallel group passes *all* tokens T of the step through each of its ranks: ``8 L h T`` elements with
    two all-reduces per layer and direction. ZeRO-3 sends ``3 Psi`` per micro-batch, however many tokens it has. The
    two are equal at ``T = 3 Psi / (8 L h)``, which is 4.5 h if Psi = 12 L h^2. Above that, ZeRO-3 sends less. Both are
    rings over n ranks, so the ring factor cancels.

    Args:
        num_params: Psi, the number of parameters.
        num_layers: L, the number of layers.
        hidden: h, the hidden size.
        column_layers: as in :func:`tensor_parallel_volume`.
    """
    per_token = tensor_parallel_volume(num_layers, 1, 1, hidden, 2, column_layers=column_layers).total
    return zero_volume(num_params, 3).total / per_token


def bus_bandwidth(
    members_per_node: int, num_ranks: int, intra_node_bandwidth: float, inter_node_bandwidth: float
) -> float:
    """Return the bytes per second that each rank of a group's ring sends.

    A group inside one node uses the links within the node. Rings over several nodes enter and leave each node once per
    member there, each time through one device's share of the network, until the links within the node are saturated.

    Args:
        members_per_node: ranks of the group on each node.
        num_ranks: ranks of the group.
        intra_node_bandwidth: bytes per second from one device to another in its node.
        inter_node_bandwidth: bytes per second of one device's share of its node's network.
    """
    if num_ranks <= members_per_node:
        return intra_node_bandwidth
    return min(intra_node_bandwidth, members_per_node * inter_node_bandwidth)


def ring_factor(kind: str, num_ranks: int) -> float:
    """Return the elements that each rank of a ring sends, per element of the full tensor.

    ``(n - 1) / n`` for an all-gather and a reduce-scatter, ``2 (n - 1) / n`` for an all-reduce.

    Raises:
        ValueError: an unknown kind, or fewer than one rank.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; a ring has at least one rank.")
    if kind == "all_reduce":
        return 2 * (num_ranks - 1) / num_ranks
    if kind in ("all_gather", "reduce_scatter"):
        return (num_ranks - 1) / num_ranks
    raise ValueError(f"There is no ring factor for {kind!r}: write all_reduce, all_gather or reduce_scatter.")
