"""What is planned: the devices, the work, and the layouts that place one on the other.

A layout is dp x tp, an engine's way of sharding, and what is offloaded. Bytes are decimal (1 GB = 1e9 bytes).
"""

from __future__ import annotations

from dataclasses import dataclass

from tutorial_lib.theory import memory, traffic
from tutorial_lib.theory.dimensions import Dimensions

ENGINES = ("deepspeed", "fsdp")
PRECISIONS = ("bf16", "fp16", "fp32")
FSDP_STRATEGIES = ("full_shard", "shard_grad_op", "hybrid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The devices. The defaults describe nodes of eight A100 80 GB (NVIDIA's data sheets, and shares of their peaks).

    Args:
        gpus: devices in all.
        gpus_per_node: of one node; the last node may not be partly used.
        gpu_memory: bytes of one device.
        host_memory: bytes of one node.
        gpu_flops: peak FLOP/s of one device in the precision of the run (A100, bf16: 312e12).
        efficiency: share of that peak that computing reaches, MFU-like (arXiv:2204.02311 reports 0.46).
        within: bytes/s that a device sends to others of its node (A100's NVLink: 300e9 in each direction).
        between: bytes/s of a device's share of its node's network (one 200 Gbit/s card per device: 25e9).
        host_link: bytes/s between a device and its host (PCIe 4.0 x16: 32e9 nominal).
        host_adam: parameters per second and node that Adam on the host updates; an assumption, measure your own.
        overlap: share of data-parallel communication that computing can hide; an assumption.
        headroom: share of a device's memory that stays free; an assumption.
    """

    gpus: int
    gpu_memory: float
    gpus_per_node: int = 8
    host_memory: float = 1000e9
    gpu_flops: float = 312e12
    efficiency: float = 0.45
    within: float = 300e9
    between: float = 25e9
    host_link: float = 25e9
    host_adam: float = 4e9
    overlap: float = 0.8
    headroom: float = 0.1

    @property
    def usable_memory(self) -> float:
        return self.gpu_memory * (1 - self.headroom)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained.

    Args:
        num_params: Psi.
        dimensions: of the model.
        seq_length: s, in tokens.
        micro_batch: b, sequences per forward pass and data-parallel rank.
        global_batch: sequences per optimizer step; ``None``: micro-batch times devices.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        checkpointing: recompute activations in backward.
        bucket_size: elements of DeepSpeed's reduction and gathering buckets.
        live_params: elements that DeepSpeed's stage 3 may keep gathered (``stage3_max_live_parameters``).
        gradient_reduction: of stages 1 and 2, as in :func:`tutorial_lib.theory.traffic.zero_volume`.
    """

    num_params: int
    dimensions: Dimensions
    seq_length: int
    micro_batch: int = 1
    global_batch: int | None = None
    precision: str = "bf16"
    checkpointing: bool = False
    bucket_size: int = 500_000_000
    live_params: int = 1_000_000_000
    gradient_reduction: str = "reduce_scatter"

    @property
    def bytes_per_element(self) -> int:
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to place the work: ``zero_stage`` for DeepSpeed, ``strategy`` for FSDP2 (then the stage it equals)."""

    dp: int
    tp: int
    zero_stage: int
    offload: str = "none"
    strategy: str | None = None

    @property
    def name(self) -> str:
        return self.strategy or f"ZeRO-{self.zero_stage}"


def layouts(workload: Workload, cluster: Cluster, engine: str = "deepspeed") -> list[Layout]:
    """What :func:`tutorial_lib.theory.plan.plan` weighs.

    A tensor-parallel group stays within a node and divides the heads. With one data-parallel rank there is nothing to
    partition: stage 0 stands for all of ZeRO without offload then, and full_shard for FSDP2's strategies.
    """
    found = []
    kv_heads, per_node = workload.dimensions.key_value_heads, min(cluster.gpus, cluster.gpus_per_node)
    for tp in range(1, per_node + 1):
        if per_node % tp or workload.dimensions.heads % tp or kv_heads % tp:
            continue
        dp = cluster.gpus // tp
        if engine == "fsdp":
            hybrid = cluster.gpus > cluster.gpus_per_node > tp
            for strategy in FSDP_STRATEGIES[: 3 if hybrid else 1 if dp == 1 else 2]:
                stage = 2 if strategy == "shard_grad_op" else 3
                found += [
                    Layout(dp=dp, tp=tp, zero_stage=stage, offload=offload, strategy=strategy)
                    for offload in ("none", "all")
                ]
            continue
        for stage in memory.STAGES:
            offloads = memory.OFFLOADS[: {0: 1, 3: 3}.get(stage, 2)]
            found += [
                Layout(dp=dp, tp=tp, zero_stage=stage, offload=offload)
                for offload in offloads
                if dp > 1 or stage == 0 or offload != "none"
            ]
    return found


def check(workload: Workload, cluster: Cluster, engine: str) -> None:
    """Refuse what cannot be planned.

    Raises:
        ValueError: an unknown engine, precision or gradient reduction, a number outside its range, half-used nodes.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}. Write one of: {', '.join(ENGINES)}.")
    if workload.precision not in PRECISIONS:
        raise ValueError(f"precision is {workload.precision!r}. Write one of: {', '.join(PRECISIONS)}.")
    if workload.gradient_reduction not in traffic.GRADIENT_REDUCTIONS:
        raise ValueError(
            f"gradient_reduction is {workload.gradient_reduction!r}. Write one of: "
            f"{', '.join(traffic.GRADIENT_REDUCTIONS)}."
        )
    counts = {"gpus": cluster.gpus, "gpus_per_node": cluster.gpus_per_node, "seq_length": workload.seq_length,
              "micro_batch": workload.micro_batch, "global_batch": workload.global_batch or 1}  # fmt: skip
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; the smallest possible value is 1.")
    for name in ("gpu_memory", "host_memory", "gpu_flops", "within", "between", "host_link", "host_adam"):
        if not getattr(cluster, name) > 0:
            raise ValueError(f"{name} is {getattr(cluster, name):g}; write a number above 0.")
    if not 0 < cluster.efficiency <= 1 or not 0 <= cluster.overlap <= 1 or not 0 <= cluster.headroom < 1:
        raise ValueError("efficiency, overlap and headroom are shares: write numbers from 0 to 1, such as 0.45.")
    if cluster.gpus > cluster.gpus_per_node and cluster.gpus % cluster.gpus_per_node:
        whole = cluster.gpus // cluster.gpus_per_node * cluster.gpus_per_node
        raise ValueError(
            f"{cluster.gpus} gpus do not fill nodes of {cluster.gpus_per_node}. Write {whole} or "
            f"{whole + cluster.gpus_per_node}, or another gpus_per_node."
        )
