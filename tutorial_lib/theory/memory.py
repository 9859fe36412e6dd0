"""Model states: bytes of parameters, gradients and optimizer states, and DeepSpeed's estimates of them.

Notation, here and in the course: Psi is the number of parameters, N the number of data-parallel ranks, t the
tensor-parallel size. Assumed: AdamW, and every parameter trained; :mod:`tutorial_lib.theory.states` knows other cases.

Sources:
    ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv:1910.02054 (figure 1, section 5)
    ZeRO-Offload, arXiv:2101.06840; ZeRO-Infinity, arXiv:2104.07857

Checked: byte for byte against what ranks held, in ``tests/distributed`` and lessons 01 to 03.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STAGES = (0, 1, 2, 3)
OFFLOADS = ("none", "optimizer", "all")


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per parameter of each kind of model state."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


MIXED = Precision(2, 2, 12)
"""Mixed-precision Adam: 16-bit weights and gradients; fp32 master copy and two moments (the paper's K = 12)."""

FP32 = Precision(4, 4, 8)
"""Adam in fp32 throughout: weights, gradients, two moments; the weights are their own master copy."""

DEEPSPEED_FP32 = Precision(4, 4, 12)
"""fp32 under DeepSpeed's stages 1-3: they keep a partitioned master copy even of weights that are fp32 already."""


@dataclass(frozen=True, slots=True)
class ModelStates:
    """Bytes on one rank, split as the paper splits them."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, int]:
        """``parameters``, ``gradients``, ``optimizer`` in bytes."""
        return {"parameters": self.parameters, "gradients": self.gradients, "optimizer": self.optimizer}


def model_states(num_params: int, stage: int, num_ranks: int, precision: Precision = MIXED) -> ModelStates:
    """Model-state bytes per rank under ZeRO, wherever they are kept.

    Stage 1 divides the optimizer states by N, stage 2 also the gradients, stage 3 also the parameters
    (arXiv:1910.02054, figure 1). Where N does not divide Psi, a rank holds the larger share.

    Args:
        num_params: Psi, tied parameters counted once.
        stage: 0 (plain data parallel) to 3.
        num_ranks: N, the data-parallel size.
        precision: bytes per parameter; :data:`MIXED`, :data:`FP32` or your own.

    Raises:
        ValueError: a stage outside 0-3, or a size below 1.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage}; ZeRO has the stages 0, 1, 2 and 3.")
    if num_params < 1 or num_ranks < 1:
        raise ValueError(f"num_params={num_params} and num_ranks={num_ranks}: both must be at least 1.")
    shard = partition_elements(num_params, num_ranks)
    return ModelStates(
        parameters=precision.parameters * (shard if stage >= 3 else num_params),
        gradients=precision.gradients * (shard if stage >= 2 else num_params),
        optimizer=precision.optimizer * (shard if stage >= 1 else num_params),
    )


def device_states(
    num_params: int, stage: int, num_ranks: int, precision: Precision = MIXED, offload: str = "none"
) -> ModelStates:
    """The part of :func:`model_states` that stays on the device; :func:`host_states` says what the host keeps.

    Optimizer offload moves the optimizer states and, from stage 2, the gradients that they are updated with
    (arXiv:2101.06840: the device keeps the 16-bit parameters alone). Offloading ``all`` at stage 3 moves the parameter
    shards as well (arXiv:2104.07857); what remains is the working set of the layers that are gathered at the moment.

    Raises:
        ValueError: an unknown offload, or one that the stage does not allow.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"offload is {offload!r}. Write one of: {', '.join(OFFLOADS)}.")
    if offload == "optimizer" and stage == 0:
        raise ValueError("offload='optimizer' needs stage 1, 2 or 3: stage 0 has no partitioned optimizer states.")
    if offload == "all" and stage != 3:
        raise ValueError(f"offload='all' moves parameters, which needs stage 3, not {stage}.")
    states = model_states(num_params, stage, num_ranks, precision)
    if offload == "none":
        return states
    return ModelStates(
        parameters=0 if offload == "all" else states.parameters,
        gradients=0 if stage >= 2 else states.gradients,
        optimizer=0,
    )


def host_states(
    num_params: int, stage: int, num_ranks: int, precision: Precision = MIXED, offload: str = "none"
) -> ModelStates:
    """Bytes that offload keeps in host memory, per rank. Arguments as of :func:`device_states`.

    More than :func:`device_states` leaves of :func:`model_states`: the host's Adam reads gradients in fp32, so each
    rank's share of them waits there in 4 bytes even where training is in 16 bits. All offloaded in 16 bits are thus
    2 + 4 + 12 = 18 bytes per parameter (DeepSpeed's ``initialize_optimizer_states``; measured in ``tests/distributed``,
    see :mod:`tutorial_lib.engine.expected`).
    """
    whole = model_states(num_params, stage, num_ranks, precision)
    device = device_states(num_params, stage, num_ranks, precision, offload)
    gradients = 0 if offload == "none" else 4 * partition_elements(num_params, num_ranks)
    return ModelStates(whole.parameters - device.parameters, gradients, whole.optimizer - device.optimizer)


def checkpoint_bytes(num_params: int, stage: int, precision: Precision = MIXED) -> int:
    """Bytes on disk of a checkpoint to train on from, all ranks' files together: no gradients, nothing twice.

    Every scheme writes its optimizer states once: K bytes per parameter, whoever holds them. They include the fp32
    master copy where there is one. What differs is the weights that forward and backward use. Stages 0 to 2 write them
    as well, by one data-parallel rank, since :data:`MIXED` states do not hold the 16-bit weights, and since DeepSpeed
    makes no difference where the master copy is equal to them (:data:`DEEPSPEED_FP32`). At stage 3 the master copy
    alone is written. So in bytes per parameter::

        stage 1, 2      MIXED 2 + 12 = 14     DEEPSPEED_FP32 4 + 12 = 16
        stage 3         MIXED     12          DEEPSPEED_FP32     12
        one process, DDP, DeepSpeed's stage 0 and FSDP2 in fp32: FP32 with stage 0, 4 + 8 = 12

    Args:
        num_params: Psi, all of them trained, tied ones counted once. Under tensor parallelism, in engines whose
            tensor-parallel ranks write what they hold (DeepSpeed), t times :func:`tensor_parallel_params`.
        stage: 0 (every rank holds all, or FSDP2, whose shards are written once) to 3.
        precision: bytes per parameter.

    Raises:
        ValueError: a stage outside 0-3.

    Source: what is saved, ``deepspeed/runtime/engine.py`` (``save_checkpoint``: ``module_state_dict`` and the
    optimizer's ``state_dict``; placeholders at stage 3); how large it is, arXiv:1910.02054, section 3.1.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage}; ZeRO has the stages 0, 1, 2 and 3.")
    return num_params * (precision.optimizer + (0 if stage == 3 else precision.parameters))


def savings_ratio(stage: int, num_ranks: int, precision: Precision = MIXED) -> float:
    """How many times less model-state memory a rank needs than under plain data parallelism.

    The often-quoted 4 x and 8 x for stages 1 and 2 are what this approaches as N grows, not what it is.
    """
    num_params = num_ranks * 1000  # any multiple of N: the ratio does not depend on Psi
    whole = model_states(num_params, 0, num_ranks, precision).total
    return whole / model_states(num_params, stage, num_ranks, precision).total


def partition_elements(num_elements: int, num_ranks: int, alignment: int = 1) -> int:
    """Elements of one rank's share of a flat tensor that is padded so that all shares are equal.

    Args:
        num_elements: elements before padding.
        num_ranks: number of shares.
        alignment: each share is a multiple of this many elements (DeepSpeed's stages 1 and 2 use 2).
    """
    return -(-num_elements // (num_ranks * alignment)) * alignment


def partitioned_elements(sizes: Iterable[int], num_ranks: int) -> int:
    """Elements per rank if every tensor is partitioned, and padded, by itself, as stage 3 does."""
    return sum(partition_elements(size, num_ranks) for size in sizes)


def reduced_gradients(sizes: Sequence[int], num_ranks: int, rank: int = 0, alignment: int = 2) -> int:
    """Elements of gradients that a rank holds under DeepSpeed's stages 1 and 2 once they are reduced.

    A rank's share is a stretch of all trained parameters laid end to end. A tensor that lies across the stretch's
    border is held whole on both sides of it.

    Args:
        sizes: elements of each trained parameter on this rank, in the model's order.
        num_ranks: N, the data-parallel size.
        rank: the data-parallel rank.
        alignment: as in :func:`partition_elements`.
    """
    share = partition_elements(sum(sizes), num_ranks, alignment)
    ends = list(itertools.accumulate(sizes))
    first, last = rank * share, (rank + 1) * share
    padding = max(0, last - max(first, sum(sizes)))
    touched = [size for size, end in zip(sizes, ends, strict=True) if end > first and end - size < last]
    return sum(touched) + padding


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that DeepSpeed's estimator prints: host memory per node, device memory per rank."""

    host: int
    device: int


def deepspeed_estimate_zero2(
    num_params: int,
    ranks_per_node: int = 1,
    num_nodes: int = 1,
    *,
    offload_optimizer: bool = True,
    buffer_factor: float = 1.5,
) -> Estimate:
    """What ``deepspeed.runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs`` computes.

    It differs from the paper: without offload a rank needs ``2 Psi + 18 Psi / N`` instead of ``2 Psi + 14 Psi / N``,
    because it also counts fp32 gradients.
    """
    ranks = ranks_per_node * num_nodes
    if offload_optimizer:
        return Estimate(int(num_params * max(4 * ranks, 16) * buffer_factor), 2 * num_params)
    return Estimate(int(num_params * 4 * ranks_per_node * buffer_factor), 2 * num_params + int(18 * num_params / ranks))


def deepspeed_estimate_zero3(
    num_params: int,
    largest_layer: int,
    ranks_per_node: int = 1,
    num_nodes: int = 1,
    *,
    offload: str = "all",
    zero_init: bool = True,
    buffer_factor: float = 1.5,
) -> Estimate:
    """What ``deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs`` computes.

    Args:
        num_params: Psi.
        largest_layer: parameters of the largest module, gathered whole while it computes.
        ranks_per_node: data-parallel ranks that share one host's memory.
        num_nodes: number of hosts.
        offload: ``none``, ``optimizer`` or ``all`` (optimizer and parameters).
        zero_init: the model is partitioned while it is built, so that no rank ever holds it whole.
        buffer_factor: spare host memory, as a factor.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"offload is {offload!r}. Write one of: {', '.join(OFFLOADS)}.")
    ranks, gathered, per_node = ranks_per_node * num_nodes, 4 * largest_layer, 1 / num_nodes
    if offload == "none":
        device = gathered + int(18 * num_params / ranks)
        host = (largest_layer if zero_init else num_params) * 4 * ranks_per_node * buffer_factor
    else:
        device = gathered + (int(2 * num_params / ranks) if offload == "optimizer" else 0)
        bytes_per_param = (18 if offload == "all" else 16) * per_node
        host = num_params * (bytes_per_param if zero_init else max(4 * ranks_per_node, bytes_per_param)) * buffer_factor
    return Estimate(int(host), device)


def tensor_parallel_params(num_params: int, replicated: int, tp: int) -> int:
    """Parameters per rank under tensor parallelism: ``(Psi - R) / t + R``, R being kept whole on every rank.

    With DeepSpeed's AutoTP the embeddings and norms are replicated, so the memory is not ``Psi / t``.
    """
    return partition_elements(num_params - replicated, tp) + replicated
