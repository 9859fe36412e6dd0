"""Peak memory of a step: the bytes of a rank that exist at the same time.

A step has three phases in which memory may peak, each with different large tensors::

    loss        activations of all layers, the loss's copies of the logits; no gradients yet, unless micro-batches
                accumulate
    backward    activations of all layers, those that one layer recomputes, gathered layers, gradients in flight
    update      no activations; all gradients (the embeddings' are still being reduced), the update's temporaries

The peak is the largest of the three sums. Many estimates simply add everything up. They count gradients and logits
together, although these only exist at the same time if micro-batches accumulate.

Besides states and activations, engines allocate *buffers*::

    FSDP2      gathered copies of the root's parameters and, in backward, of two layers (with shard_grad_op, of all
               parameters from the loss on); a layer's gradient, and its fp32 copy for the reduce-scatter; at the end
               the same for the root (and the embedding's gradient once more if the output layer shares its weight)
    DDP        16-bit copies of all weights, which autocast caches until backward has used them; gradients live in
               DDP's buckets, which always exist
    DeepSpeed  (ZeRO stages in parentheses) a bucket of gradients of the full ``reduce_bucket_size``, however small the
               model: from the start (3), from a step's first backward (1), or during backward (2); two of them with
               ``overlap_comm`` (1, 2); with gloo, at the update a bucket of updated parameters (1, 2); parameters that
               stay gathered up to ``stage3_max_live_parameters`` (3, on several ranks, or from the host); a flat copy
               of the bucket's gradients, to be sent (3, on several ranks); in 16 bits an fp32 copy of the gradients
               that a rank updates with, made before they are freed and kept until after the update; norms in fp64, one
               tensor at a time (1 to 3)
    pipeline   gathered weights (full gradients, which wait for the last micro-batch, count as states)

Sources: ``torch.distributed.fsdp`` (``_fsdp_collectives.py``: copy-in and copy-out), ``torch.amp`` (weight cache),
``deepspeed/runtime/zero`` (``setup_buckets`` of stage_1_and_2.py; the bucket that stage3.py makes with the optimizer).
Assumptions: one layer is gathered ahead. FSDP2's AdamW is fused and copies nothing, and so is DDP's, except the
Trainer's. Elsewhere, AdamW on GPUs updates all tensors at once (``foreach``), with one more fp32 copy of them. On CPUs
it updates one tensor at a time, with two copies of it. ZeRO's stages 1 to 3 flatten a rank's parameters into one large
tensor (at stage 3, of about ``sub_group_size`` elements).
Not modelled: buffers for messages between a pipeline's stages; masks of packed rows.
Checked: docs/planner-errors.md, against peaks of our own runs and published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tutorial_lib.theory import memory, pipeline
from tutorial_lib.theory.activations import last_norm, layer_activations, logits_bytes
from tutorial_lib.theory.dimensions import Dimensions
from tutorial_lib.theory.layouts import Layout, Workload
from tutorial_lib.theory.state_bytes import States


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes on a device at the peak of one phase of a step."""

    phase: str
    activations: float
    buffers: float
    states: float

    @property
    def total(self) -> float:
        return self.activations + self.buffers + self.states


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's part of the model: number of layers, elements of a layer, elements outside the layers, and the total."""

    layers: int
    layer: float
    root: float
    params: int


@cache
def part_of_model(
    dimensions: Dimensions, num_params: int, tp: int = 1, pp: int = 1, *, engine: str = "deepspeed",
    sequence_parallel: bool = False,
) -> Part:  # fmt: skip
    """Return a rank's part of the model, before data parallelism shards it; with a pipeline, the largest stage's.

    Args:
        dimensions: dimensions of the model.
        num_params: Psi, which may differ a little from the number that follows from the dimensions.
        tp: tensor-parallel size. Embeddings, norms and a tied output layer are replicated (under FSDP2 any output
            layer), unless ``sequence_parallel`` splits them by vocabulary.
        pp: pipeline stages; the first has the embedding, the last the output layer.
        engine: ``deepspeed`` or ``fsdp``.
        sequence_parallel: see ``tp``.
    """
    replicated = 0 if sequence_parallel else dimensions.replicated_params(engine)
    params = memory.tensor_parallel_params(num_params, min(replicated, num_params), tp)
    scale = num_params / dimensions.num_params
    layer = scale * dimensions.layer_params / tp
    root = max(0.0, params - dimensions.layers * layer)
    if pp == 1:
        return Part(dimensions.layers, layer, root, params)
    layers = -(-dimensions.layers // pp)
    end = root if dimensions.tied else root / 2
    return Part(layers, layer, end, int(layers * layer + end))


def peak_memory(workload: Workload, layout: Layout, part: Part, states: States, micro_batches: int) -> Peak:
    """Return the phase of :func:`phase_peaks` that needs the most memory."""
    return max(phase_peaks(workload, layout, part, states, micro_batches), key=lambda peak: peak.total)


def phase_peaks(workload: Workload, layout: Layout, part: Part, states: States, micro_batches: int) -> list[Peak]:
    """Return each phase of a step with its peak memory.

    Args:
        workload: the training to run.
        layout: how it is laid out.
        part: the rank's part of the model, from :func:`part_of_model`.
        states: model states of one rank.
        micro_batches: number of micro-batches per step.
    """
    dims, element = workload.dimensions, workload.bytes_per_element
    tokens = layout.micro_batch * workload.seq_length / layout.cp
    autocast = ("cuda" if workload.on_gpu else "cpu") if casts_weights(workload, layout) else ""
    layer = layer_activations(
        dims, layout.checkpointing, layout.tp, sequence_parallel=layout.sequence_parallel,
        bytes_per_element=element, seq_length=0 if dims.fused_attention else workload.seq_length, autocast=autocast,
    )  # fmt: skip
    transient = layer.transient * tokens
    kept = part.layers * layer.kept * tokens
    last = tokens * last_norm(dims, element, layout.tp, sequence_parallel=layout.sequence_parallel, autocast=autocast)
    logits = logits_bytes(
        tokens, dims.vocabulary, chunks=workload.loss_chunks,
        vocabulary_parallel=layout.tp if layout.sequence_parallel else 1,
    )  # fmt: skip
    early = states.device - states.gradients  # states before backward has produced a gradient
    before = states.device if micro_batches > 1 or keeps_gradients(layout) else early
    if layout.pp > 1:
        held = pipeline.micro_batches_held(layout.pp, micro_batches, layout.chunks)
        gathered = float(element * part.params) if layout.strategy else 0.0
        return [
            Peak("loss", kept + last + logits, gathered, before),
            Peak("backward", held * kept + transient, gathered, before),
            Peak("update", 0.0, gathered, states.device),
        ]
    gathered, backward, update = _buffers(workload, layout, part, states, micro_batches)
    return [
        Peak("loss", kept + last + logits, gathered, before),
        Peak("backward", kept + transient, backward, before),
        Peak("update", 0.0, update, states.device),
    ]


def casts_weights(workload: Workload, layout: Layout) -> bool:
    """Return whether autocast computes in 16 bits on fp32 weights (not with LoRA: its base has 16 bits or fewer)."""
    return layout.strategy == "no_shard" and workload.bytes_per_element == 2 and not workload.lora_rank


def _buffers(
    workload: Workload, layout: Layout, part: Part, states: States, micro_batches: int
) -> tuple[float, float, float]:
    """Return the bytes of an engine's buffers at the loss, in backward, and from the last reduction to the update."""
    element, shards = workload.bytes_per_element, layout.dp * layout.cp
    trained = 0.0 if workload.lora_rank else 1.0
    embedding = trained * _embedding(workload, layout)
    if layout.strategy == "no_shard":
        casts = float(element * part.params) if casts_weights(workload, layout) else 0.0
        copy = 4 * trained * part.params if workload.on_gpu and not workload.fused_adamw else 0.0
        # The norm needs the embedding's gradient in fp64. On CPUs, the gradient of a tied output layer exists too.
        return casts, casts, max(copy, (8 if workload.on_gpu else 12) * embedding)
    if layout.strategy:
        root, layer, reduced = element * part.root, element * part.layer, 4 * trained * part.layer
        ahead = layer * min(2, part.layers)
        twice = element * embedding if workload.dimensions.tied else 0.0
        update = root + trained * (element + 4) * part.root + twice + reduced
        if layout.strategy == "shard_grad_op":
            gathered = float(element * part.params)
            return gathered, gathered + trained * layer + reduced, update
        return root, root + ahead + trained * layer + reduced, update
    update = trained * _deepspeed_update(workload, layout, part.params / (shards if layout.zero_stage else 1), states)
    some_params = float(min(part.params, workload.bucket_size) * element)
    if layout.zero_stage == 0:
        return 0.0, trained * some_params, max(trained * some_params, update)
    bucket = float(workload.bucket_size * element)
    if layout.zero_stage == 3:
        copies = shards > 1 or layout.offload == "all"
        kept = bucket + (min(part.params, workload.live_params) * element if copies else 0)
        sent = trained * some_params if shards > 1 else 0.0
        return kept, kept + sent, bucket + update  # the update starts by releasing what is gathered
    buckets = bucket * (2 if workload.overlap_comm else 1)
    earlier = buckets if micro_batches > 1 and layout.zero_stage == 1 else 0.0  # made in the first backward of a step
    return earlier, buckets, update if workload.on_gpu else max(buckets + trained * some_params, update)


def _deepspeed_update(workload: Workload, layout: Layout, own: float, states: States) -> float:
    """Return the bytes that DeepSpeed's update needs on the device, on top of the model states.

    Args:
        workload: the training to run.
        layout: how it is laid out.
        own: elements that this rank updates.
        states: the rank's model states; stages 1 and 2 free gradients as soon as they have copied them.
    """
    element, stage = workload.bytes_per_element, layout.zero_stage
    embedding = _embedding(workload, layout)
    norm = 8 * min(embedding, own) if stage in (1, 2) else 0.0  # the largest gradient, in fp64
    if layout.offload != "none":
        return norm and norm + element * min(embedding, own)
    if stage == 0:
        copy = 4 * own if element == 2 else 0.0
        return copy + (4 * own if workload.on_gpu else 8 * embedding)
    if stage == 3:
        own = min(own, _largest_sub_group(workload, layout))
    flat = element * own + (4 * own if element == 2 else 0.0)
    freed = 0.0 if keeps_gradients(layout) else states.gradients
    others = max(0.0, freed - element * own)  # gradients of other ranks' shares, freed before anything is copied
    return max(norm - others, flat - others, 4 * own + (4 if workload.on_gpu else 8) * own - freed)


def _largest_sub_group(workload: Workload, layout: Layout) -> float:
    """Return the most elements that a rank updates at a time with DeepSpeed's stage 3.

    Parameters are added to a sub-group in the model's order, up to the one that makes it reach ``sub_group_size``
    (``_create_fp16_sub_groups`` of stage3.py). The embedding comes first, and a separate output layer comes last.
    """
    dims, shards = workload.dimensions, layout.dp * layout.cp
    output = 0 if dims.tied else dims.vocabulary * dims.hidden
    last = max(output, *(rows * columns for rows, columns in dims.linear_widths)) / layout.tp
    embedding = max(_embedding(workload, layout), dims.positions * dims.hidden)
    return max(embedding / shards, workload.sub_group_size + last / shards)


def _embedding(workload: Workload, layout: Layout) -> float:
    """Return the elements of the embedding on a rank; tensor parallelism divides it with sequence parallelism only."""
    elements = workload.dimensions.vocabulary * workload.dimensions.hidden
    return elements / (layout.tp if layout.sequence_parallel else 1)


def keeps_gradients(layout: Layout) -> bool:
    """Return whether gradients have a buffer that is never freed, as in DeepSpeed's stage 3."""
    return layout.strategy is None and layout.zero_stage == 3


def standing_bucket(workload: Workload, layout: Layout) -> float:
    """Return the bytes of the bucket that DeepSpeed's stage 3 allocates together with the optimizer."""
    if layout.strategy or layout.zero_stage != 3:
        return 0.0
    return float(workload.bucket_size * workload.bytes_per_element)
