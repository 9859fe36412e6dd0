"""Model states of a layout: bytes per trained or frozen parameter, on the device and on the host.

============================== ========== ========== ============================= ======
per trained parameter          weights    gradients  optimizer                     bytes
============================== ========== ========== ============================= ======
DeepSpeed, 16 bits             2          2          4 (master copy) + 8 (moments) 16
DeepSpeed ZeRO 1 to 3, fp32    4          4          4 (master copy) + 8           20
DeepSpeed stage 0, FSDP2, DDP  4          4          8                             16
============================== ========== ========== ============================= ======

Moments take 8 bytes in fp32, 4 in bf16, and 2 in 8 bits (their scale per block of 2048 is ignored: under 0.1 %). A
frozen parameter has only its weight. LoRA (arXiv:2106.09685) freezes all weights and trains ``r (inputs + outputs)``
elements per matrix. QLoRA (arXiv:2305.14314) stores the layers' frozen matrices in 4 bits (0.5 bytes, and 0.016 for
doubly quantized scales), while embeddings, output layer, norms and biases stay in 16 bits: bitsandbytes replaces all
linear layers except the output layer (``replace_with_bnb_linear`` of transformers). The same holds for 8 bits.

Sources: ZeRO, arXiv:1910.02054, section 3.1; 8-bit optimizers, arXiv:2110.02861; ``torch.distributed.fsdp.fully_shard``
for FSDP2's shards (fp32; the bf16 copy only exists while gathered).
Checked: fp32 moments byte for byte, in ``tests/distributed``. This course's engines have neither bf16 or 8-bit moments
nor LoRA, so these were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from tutorial_lib.theory import memory
from tutorial_lib.theory.dimensions import Dimensions
from tutorial_lib.theory.layouts import Layout, Workload

BASE_BYTES = {16: 2.0, 8: 1.0, 4: 0.516}
"""Bytes per element of the layers' frozen matrices, by the bits they are stored in; everything else has 2 bytes."""


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of a rank's model states: the peak on its device, the gradients within that peak, and those on its host."""

    device: float
    gradients: float
    host: float


def lora_params(dimensions: Dimensions, rank: int) -> int:
    """Return the elements that LoRA trains, with an adapter on every matrix of every layer."""
    return dimensions.layers * rank * sum(inputs + outputs for inputs, outputs in dimensions.linear_widths)


def base_bytes(workload: Workload, layout: Layout, params: int) -> float:
    """Return the bytes of a rank's frozen base: matrices of the layers in ``base_bits``, the rest in 16 bits.

    Args:
        workload: the training to run.
        layout: how it is laid out.
        params: elements of this rank's part of the model.
    """
    dims = workload.dimensions
    widths = sum(inputs * outputs for inputs, outputs in dims.linear_widths)
    matrices = min(float(params), dims.layers * widths / (layout.tp * layout.pp))
    return BASE_BYTES[workload.base_bits] * matrices + 2 * (params - matrices)


def precision_of(workload: Workload, layout: Layout) -> memory.Precision:
    """Return the bytes per trained parameter."""
    if layout.strategy:
        found = memory.FP32
    elif workload.precision != "fp32":
        found = memory.MIXED
    else:
        found = memory.DEEPSPEED_FP32 if layout.zero_stage else memory.FP32
    saved = 8 - {"fp32": 8, "bf16": 4, "8bit": 2}[workload.moments]
    return memory.Precision(found.parameters, found.gradients, found.optimizer - saved)


def layout_states(workload: Workload, layout: Layout, params: int, accumulation: int, ranks: int) -> States:
    """Return the bytes of model states of one rank.

    Args:
        workload: the training to run.
        layout: how it is laid out.
        params: elements of this rank's part of the model, before data parallelism divides it.
        accumulation: micro-batches per step.
        ranks: number of ranks that share one copy.
    """
    trained = params
    frozen_device = 0.0
    if workload.lora_rank:
        trained = -(-lora_params(workload.dimensions, workload.lora_rank) // (layout.tp * layout.pp))
        shards_weights = layout.zero_stage == 3 or layout.strategy == "shard_grad_op"
        frozen_device = base_bytes(workload, layout, params) / (ranks if shards_weights else 1)
    precision = precision_of(workload, layout)
    if layout.strategy == "no_shard":
        replicated = memory.model_states(trained, 0, 1, precision)
        in_buckets = ranks > 1  # with DDP, gradients are views of its buckets
        return States(replicated.total + frozen_device, 0.0 if in_buckets else replicated.gradients, 0.0)
    if layout.strategy:
        # A rank holds shards of fp32 weights, gradients and moments. Without resharding after forward, the gathered
        # copies stay and count as buffers. Gradients that are reduced with the last micro-batch wait in full until
        # then, and only become shards afterwards.
        sharded = memory.model_states(trained, 3, ranks, precision)
        waits = layout.reduction == "last" and accumulation > 1 and ranks > 1
        waiting = 4 * trained if waits else 0
        if layout.offload == "all":
            return States(waiting, waiting, sharded.total + frozen_device)
        gradients = max(waiting, sharded.gradients)
        return States(sharded.total - sharded.gradients + gradients + frozen_device, gradients, 0.0)
    device = memory.device_states(trained, layout.zero_stage, ranks, precision, layout.offload)
    host = memory.host_states(trained, layout.zero_stage, ranks, precision, layout.offload)
    total, gradients = device.total, device.gradients
    if layout.zero_stage == 1 and accumulation == 1:
        # Gradients are reduced at once, as at stage 2. They only wait in full between micro-batches (see lab 01).
        reduced = memory.device_states(trained, 2, ranks, precision, layout.offload).gradients
        total, gradients = total - gradients + reduced, reduced
    if layout.offload == "all":
        return States(total, gradients, host.total + frozen_device)
    return States(total + frozen_device, gradients, host.total)
