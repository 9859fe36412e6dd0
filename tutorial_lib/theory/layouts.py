"""Inputs and outputs of the planner: a cluster, a workload, and the layouts that place the work on the devices.

Bytes are decimal (1 GB = 1e9 bytes). The defaults of :class:`Cluster` are the preset ``a100-80`` of
:mod:`tutorial_lib.theory.hardware`, with its sources, and four assumptions that are marked as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tutorial_lib.theory import traffic
from tutorial_lib.theory.dimensions import Dimensions
from tutorial_lib.theory.hardware import GPUS, find_gpu, peak_flops

ENGINES = ("deepspeed", "fsdp")
PRECISIONS = ("bf16", "fp16", "fp32")
FSDP_STRATEGIES = ("no_shard", "shard_grad_op", "full_shard", "hybrid")
MOMENTS = ("fp32", "bf16", "8bit")

_A100 = GPUS["a100-80"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The devices of a job, and the links between them.

    Args:
        gpus: total number of devices.
        gpus_per_node: devices of one node; a job on several nodes must use every node completely.
        gpu_memory: bytes of one device.
        host_memory: bytes of one node; an assumption.
        gpu_flops: peak FLOP/s of one device in the precision of the run.
        efficiency: share of that peak that training reaches, recomputation included (HFU, not MFU).
        memory_bandwidth: bytes/s of a device's own memory, which limits the optimizer's update.
        intra_node_bandwidth: bytes/s that a device sends to the other devices in its node.
        inter_node_bandwidth: bytes/s of a device's share of its node's network.
        host_link: bytes/s between a device and its host.
        host_adam: parameters per second and node that Adam on the host updates; an assumption: measure your own.
        overlap: share of data-parallel communication that compute can hide; an assumption.
        headroom: share of a device's memory that stays free for fragmentation, CUDA and NCCL; an assumption.
    """

    gpus: int
    gpu_memory: float
    gpus_per_node: int = _A100.gpus_per_node
    host_memory: float = 1000e9
    gpu_flops: float = _A100.flops["bf16"]
    efficiency: float = _A100.efficiency
    memory_bandwidth: float = _A100.memory_bandwidth
    intra_node_bandwidth: float = _A100.intra_node_bandwidth
    inter_node_bandwidth: float = _A100.inter_node_bandwidth
    host_link: float = _A100.host_link
    host_adam: float = 4e9
    overlap: float = 0.8
    headroom: float = 0.1

    @classmethod
    def of(cls, preset: str, gpus: int, precision: str = "bf16", **changes: Any) -> Cluster:
        """Return a cluster with this many devices of a preset, after changes to the preset's values.

        Raises:
            ValueError: there is no such preset, or the device does not support that precision.
        """
        gpu = find_gpu(preset)
        own = {
            "gpu_memory": gpu.memory, "gpus_per_node": gpu.gpus_per_node, "gpu_flops": peak_flops(preset, precision),
            "efficiency": gpu.efficiency, "memory_bandwidth": gpu.memory_bandwidth, "host_link": gpu.host_link,
            "intra_node_bandwidth": gpu.intra_node_bandwidth, "inter_node_bandwidth": gpu.inter_node_bandwidth,
        }  # fmt: skip
        return cls(gpus=gpus, **(own | changes))

    @property
    def usable_memory(self) -> float:
        return self.gpu_memory * (1 - self.headroom)

    @property
    def per_node(self) -> int:
        """Number of devices used per node."""
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The training to plan.

    Args:
        num_params: Psi, the number of parameters.
        dimensions: dimensions of the model.
        seq_length: s, in tokens.
        micro_batch: b, sequences per forward pass and data-parallel rank; with ``None`` the planner chooses.
        global_batch: sequences per optimizer step; ``None`` means micro-batch times devices or, if the planner chooses
            the micro-batch, one micro-batch per rank (4 per stage with a pipeline).
        precision: ``bf16``, ``fp16`` or ``fp32``.
        checkpointing: activation checkpointing, ``none``, ``selective`` or ``full``; with ``None`` the planner chooses.
        bucket_size: elements of DeepSpeed's reduce and all-gather buckets.
        overlap_comm: whether DeepSpeed's stages 1 and 2 fill one bucket of gradients while they reduce another.
        live_params: elements that DeepSpeed's stage 3 may keep gathered (``stage3_max_live_parameters``).
        sub_group_size: elements that DeepSpeed's stage 3 updates at a time, give or take one parameter.
        gradient_reduction: for stages 1 and 2, as in :func:`tutorial_lib.theory.traffic.zero_volume`; the default is
            DeepSpeed's actual behaviour (lesson 01 counts it).
        lora_rank: rank of LoRA's adapters, if only these are trained; 0 trains all parameters.
        base_bits: bits per frozen parameter with LoRA: 16, 8 or 4 (QLoRA).
        moments: number format of Adam's moments: ``fp32``, ``bf16`` or ``8bit``.
        loss_chunks: number of pieces in which output layer and loss are computed.
        on_gpu: count memory that only GPUs need, such as AdamW's copy of all the tensors that it updates at once.
        fused_adamw: whether AdamW is fused under ``no_shard``, and therefore copies nothing. This course's DDP fuses
            it; one plain process and the Trainer do not.
        allow_missing: also consider layouts with features that this course's engines lack.
    """

    num_params: int
    dimensions: Dimensions
    seq_length: int
    micro_batch: int | None = None
    global_batch: int | None = None
    precision: str = "bf16"
    checkpointing: str | None = None
    bucket_size: int = 500_000_000
    overlap_comm: bool = False
    live_params: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    gradient_reduction: str = "all_reduce"
    lora_rank: int = 0
    base_bits: int = 16
    moments: str = "fp32"
    loss_chunks: int = 1
    on_gpu: bool = True
    fused_adamw: bool = True
    allow_missing: bool = True

    @property
    def bytes_per_element(self) -> int:
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to place the work on the devices.

    Args:
        dp: data-parallel size.
        tp: tensor-parallel size, within a node.
        zero_stage: DeepSpeed's stage, or the equivalent of FSDP2's strategy.
        offload: ``none``, ``optimizer`` or ``all``.
        strategy: FSDP2's strategy, or ``None`` for DeepSpeed.
        shard_size: number of ranks that share one copy with ``hybrid``.
        sequence_parallel: whether tp also divides norms and residuals by tokens, and embeddings and loss by vocabulary.
        cp: context-parallel size.
        ulysses: whether cp uses all-to-alls, as in Ulysses, instead of a ring.
        pp: pipeline stages.
        chunks: model chunks per stage; more than 1 means an interleaved schedule.
        micro_batch: b, sequences per forward pass and data-parallel rank.
        checkpointing: ``none``, ``selective`` or ``full``.
        reduction: ``each`` or ``last``: whether FSDP2 reduces gradients with each micro-batch or only with the last.
    """

    dp: int
    tp: int
    zero_stage: int
    offload: str = "none"
    strategy: str | None = None
    shard_size: int | None = None
    sequence_parallel: bool = False
    cp: int = 1
    ulysses: bool = False
    pp: int = 1
    chunks: int = 1
    micro_batch: int = 1
    checkpointing: str = "none"
    reduction: str = "last"

    @property
    def gpus(self) -> int:
        """Number of devices."""
        return self.dp * self.tp * self.cp * self.pp

    @property
    def name(self) -> str:
        """The sharding, with the axes that have no column in the planner's table: ``full_shard cp4u pp8i``."""
        sharding = self.strategy or f"ZeRO-{self.zero_stage}"
        if self.shard_size:
            sharding += f"/{self.shard_size}"
        cp = [f"cp{self.cp}{'u' if self.ulysses else ''}"] if self.cp > 1 else []
        pp = [f"pp{self.pp}{'i' if self.chunks > 1 else ''}"] if self.pp > 1 else []
        return " ".join([sharding, *cp, *pp])

    @property
    def engine(self) -> str:
        return "fsdp" if self.strategy else "deepspeed"

    @property
    def complexity(self) -> int:
        """Weighted number of settings that differ from plain data parallelism: lower is easier to run and debug."""
        return (
            (0 if self.zero_stage == 0 or self.strategy == "no_shard" else 1)
            + (self.strategy == "hybrid")
            + 2 * (self.tp > 1)
            + 2 * (self.cp > 1)
            + 3 * (self.pp > 1)
            + 2 * (self.offload != "none")
            + (self.checkpointing != "none")
        )


def missing_here(layout: Layout, workload: Workload) -> list[str]:
    """List the features that a layout needs and this course's engines lack; empty if they can run it."""
    needs = {
        "sequence parallelism and a vocabulary-parallel loss": layout.sequence_parallel,
        "context parallelism": layout.cp > 1,
        "a pipeline": layout.pp > 1,
        "stage 0 with tp in 16 bits": layout.strategy is None and layout.zero_stage == 0 and layout.tp > 1
        and workload.precision != "fp32",
        f"tensor parallelism for this model under {'FSDP2' if layout.strategy else 'DeepSpeed'}": layout.tp > 1
        and layout.engine not in workload.dimensions.tp_engines,
    }  # fmt: skip
    found = [name for name, is_needed in needs.items() if is_needed]
    return found + missing_for(workload, layout.engine)


def missing_for(workload: Workload, engine: str) -> list[str]:
    """List the features that every layout of a workload needs and this course's engines lack."""
    needs = {
        "LoRA": workload.lora_rank > 0,
        f"{workload.moments} moments": workload.moments != "fp32",
        "fp16 under FSDP2": engine == "fsdp" and workload.precision == "fp16",
    }
    return [name for name, is_needed in needs.items() if is_needed]


def check(workload: Workload, cluster: Cluster, engine: str) -> None:
    """Refuse inputs that cannot be planned.

    Raises:
        ValueError: an unknown engine, precision or other choice, a number outside its range, partly used nodes, or,
            without ``allow_missing``, features that this course's engines lack.
    """
    choices = {
        "engine": (engine, ENGINES), "precision": (workload.precision, PRECISIONS),
        "gradient_reduction": (workload.gradient_reduction, traffic.GRADIENT_REDUCTIONS),
        "moments": (workload.moments, MOMENTS), "base_bits": (workload.base_bits, (16, 8, 4)),
        "checkpointing": (workload.checkpointing, (None, "none", "selective", "full")),
    }  # fmt: skip
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}. Write one of: {', '.join(str(a) for a in allowed if a)}.")
    counts = {
        "gpus": cluster.gpus, "gpus_per_node": cluster.gpus_per_node, "seq_length": workload.seq_length,
        "micro_batch": workload.micro_batch or 1, "global_batch": workload.global_batch or 1,
        "loss_chunks": workload.loss_chunks,
    }  # fmt: skip
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; the smallest possible value is 1.")
    _check_sizes(workload)
    if not workload.allow_missing and (lacking := missing_for(workload, engine)):
        raise ValueError(f"This course's engines do not have {', '.join(lacking)}. Leave out --only-here.")
    for name in ("gpu_memory", "host_memory", "gpu_flops", "memory_bandwidth", "intra_node_bandwidth",
                 "inter_node_bandwidth", "host_link", "host_adam"):  # fmt: skip
        if not getattr(cluster, name) > 0:
            raise ValueError(f"{name} is {getattr(cluster, name):g}; write a number above 0.")
    if not 0 < cluster.efficiency <= 1 or not 0 <= cluster.overlap <= 1 or not 0 <= cluster.headroom < 1:
        raise ValueError("efficiency, overlap and headroom are shares: write numbers from 0 to 1, such as 0.45.")
    if cluster.gpus > cluster.gpus_per_node and cluster.gpus % cluster.gpus_per_node:
        fewer = cluster.gpus // cluster.gpus_per_node * cluster.gpus_per_node
        raise ValueError(
            f"{cluster.gpus} gpus do not fill nodes of {cluster.gpus_per_node}. Write {fewer} or "
            f"{fewer + cluster.gpus_per_node}, or another gpus_per_node."
        )


def _check_sizes(workload: Workload) -> None:
    dims = workload.dimensions
    if workload.seq_length > dims.positions > 0:
        raise ValueError(
            f"seq_length is {workload.seq_length}, but this model has learned positions for {dims.positions} tokens. "
            f"Write at most {dims.positions}."
        )
    if workload.loss_chunks > workload.seq_length:
        raise ValueError(
            f"loss_chunks is {workload.loss_chunks}, more than the {workload.seq_length} tokens of a sequence. Write a "
            f"smaller number, such as {min(8, workload.seq_length)}."
        )
    if workload.lora_rank > dims.hidden:
        raise ValueError(
            f"lora is {workload.lora_rank}: adapters of a rank above the hidden size, {dims.hidden}, are larger than "
            f"the matrices that they adapt. Write a smaller number, such as {min(16, dims.hidden)}."
        )
