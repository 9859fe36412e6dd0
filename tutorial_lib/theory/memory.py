"""Model states: bytes of parameters, gradients and optimizer states.

Notation, here and in the course: Psi is the number of parameters, N the number of data-parallel ranks, t the
tensor-parallel size. This assumes AdamW, and that every parameter is trained; other cases are in
:mod:`tutorial_lib.theory.state_bytes`.

Sources:
    ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv:1910.02054 (figure 1, section 5)
    ZeRO-Offload, arXiv:2101.06840; ZeRO-Infinity, arXiv:2104.07857

Checked: byte for byte against the states that ranks held, in ``tests/distributed`` and lessons 01 to 03.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

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
        """Return the bytes of ``parameters``, ``gradients`` and ``optimizer``."""
        return asdict(self)


def model_states(num_params: int, stage: int, num_ranks: int, precision: Precision = MIXED) -> ModelStates:
    """Return the bytes of model states per rank under ZeRO, on the device and on the host together.

    Stage 1 divides the optimizer states by N, stage 2 also the gradients, stage 3 also the parameters
    (arXiv:1910.02054, figure 1). If N does not divide Psi, the larger share counts.

    Args:
        num_params: Psi, with tied parameters counted once.
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
    """Return the part of :func:`model_states` that stays on the device; see :func:`host_states` for the host's part.

    Optimizer offload moves the optimizer states and, from stage 2 on, the gradients for their update (arXiv:2101.06840:
    the device only keeps the 16-bit parameters). Offloading ``all`` at stage 3 moves the parameter shards as well
    (arXiv:2104.07857); only the layers that are gathered at the moment remain on the device.

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
    """Return the bytes per rank that offload keeps in host memory; the arguments are those of :func:`device_states`.

    This is more than the difference between :func:`model_states` and :func:`device_states`: the host's Adam reads
    gradients in fp32, so each rank's share of them takes 4 bytes there, even when training in 16 bits. Offloading
    everything in 16 bits therefore takes 2 + 4 + 12 = 18 bytes per parameter (DeepSpeed's
    ``initialize_optimizer_states``; measured in ``tests/distributed``, see :mod:`tutorial_lib.engine.expected_states`).
    """
    everything = model_states(num_params, stage, num_ranks, precision)
    device = device_states(num_params, stage, num_ranks, precision, offload)
    gradients = 0 if offload == "none" else 4 * partition_elements(num_params, num_ranks)
    return ModelStates(everything.parameters - device.parameters, gradients, everything.optimizer - device.optimizer)


def checkpoint_bytes(num_params: int, stage: int, precision: Precision = MIXED) -> int:
    """Return the bytes on disk of a resumable checkpoint, in the files of all ranks, without gradients or duplicates.

    Every scheme writes its optimizer states once: K bytes per parameter, whichever ranks hold them. They include the
    fp32 master copy if there is one. The schemes differ in the weights that forward and backward use. At stages 0 to 2,
    one data-parallel rank writes them as well: the optimizer states of :data:`MIXED` lack the 16-bit weights, and
    DeepSpeed does the same even if the master copy equals the weights (:data:`DEEPSPEED_FP32`). At stage 3, only the
    master copy is written. In bytes per parameter, this makes::

        stage 1, 2      MIXED 2 + 12 = 14     DEEPSPEED_FP32 4 + 12 = 16
        stage 3         MIXED     12          DEEPSPEED_FP32     12
        one process, DDP, DeepSpeed's stage 0 and FSDP2 in fp32: FP32 with stage 0, 4 + 8 = 12

    Args:
        num_params: Psi; all parameters are trained, and tied ones are counted once. If every tensor-parallel rank
            writes its own part (DeepSpeed), pass t times :func:`tensor_parallel_params`.
        stage: ZeRO stage, 0 to 3; pass 0 for FSDP2, whose shards are written once.
        precision: bytes per parameter.

    Raises:
        ValueError: a stage outside 0-3.

    Sources: ``deepspeed/runtime/engine.py`` for the saved tensors (``save_checkpoint``: ``module_state_dict`` and the
    optimizer's ``state_dict``; placeholders at stage 3); arXiv:1910.02054, section 3.1, for their sizes.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage}; ZeRO has the stages 0, 1, 2 and 3.")
    return num_params * (precision.optimizer + (0 if stage == 3 else precision.parameters))


def partition_elements(num_elements: int, num_ranks: int, alignment: int = 1) -> int:
    """Return the elements of one rank's share of a flat tensor that is padded to make all shares equal.

    Args:
        num_elements: elements before padding.
        num_ranks: number of shares.
        alignment: each share is a multiple of this many elements (DeepSpeed's stages 1 and 2 use 2).
    """
    return -(-num_elements // (num_ranks * alignment)) * alignment


def partitioned_elements(sizes: Iterable[int], num_ranks: int) -> int:
    """Return the elements per rank if every tensor is partitioned and padded separately, as at stage 3."""
    return sum(partition_elements(size, num_ranks) for size in sizes)


def reduced_gradients(sizes: Sequence[int], num_ranks: int, rank: int = 0) -> int:
    """Return the elements of gradients that a rank holds with DeepSpeed's stages 1 and 2 once they are reduced.

    A rank's share is a contiguous slice of all trained parameters, concatenated. A tensor that crosses the boundary
    between two slices is held in full on both ranks.

    Args:
        sizes: elements of each trained parameter on this rank, in the model's order.
        num_ranks: N, the data-parallel size.
        rank: the data-parallel rank.
    """
    share = partition_elements(sum(sizes), num_ranks, alignment=2)
    ends = list(itertools.accumulate(sizes))
    first, last = rank * share, (rank + 1) * share
    padding = max(0, last - max(first, sum(sizes)))
    touched = [size for size, end in zip(sizes, ends, strict=True) if end > first and end - size < last]
    return sum(touched) + padding


def tensor_parallel_params(num_params: int, replicated: int, tp: int) -> int:
    """Return the parameters per rank with tensor parallelism: ``(Psi - R) / t + R``, where R is replicated.

    With DeepSpeed's AutoTP the embeddings and norms are replicated, so the memory is not ``Psi / t``.
    """
    return partition_elements(num_params - replicated, tp) + replicated
