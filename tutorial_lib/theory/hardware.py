"""Hardware presets: a GPU's memory, its FLOP/s at peak and in training, and the bandwidth of its links.

Memory and peaks come from the vendors (dense, no sparsity). Values that training *reaches* were measured by the sources
below, or are marked *plausible*: taken from a similar device, to be replaced by your own measurement.

Sources, by their letter in the table:
    a  stas00/ml-engineering, compute/accelerator (specifications; MAMF, the largest matmul FLOP/s measured)
    b  stas00/ml-engineering, network (A100 node 235 GB/s; MI300X node 312.9 GB/s on 8 GPUs, 47.7 on 2)
    c  NVIDIA/nccl-tests issue 212, an NCCL maintainer: H100 NVLink reaches 370 GB/s of 450
    d  NVIDIA/nccl-tests issue 290, an NCCL maintainer: 46 to 48 GB/s per NIC of 400 Gbit/s
    e  NVIDIA/nccl-tests issue 100: 91 GB/s over four NICs of 200 Gbit/s, so 22.7 each; we assume one per GPU
    f  NVIDIA/nvbandwidth issue 53 (A100, PCIe 4.0: 25 GB/s) and 24 (H100, PCIe 5.0: 52.8 GB/s from device to host)
    g  ZaidQureshi/bam issue 54: 12 GB/s reached by a V100 on PCIe 3.0, 25 by an A100 on PCIe 4.0
    h  NVIDIA/nccl-tests issue 307: NCCL expects 10 GB/s between GPUs of two sockets (eight RTX 4090)
    i  mosaicml/llm-foundry, scripts/train/benchmarking: the median HFU of all bf16 rows of 1 B parameters and more (43
       rows for H100, 36 for A100 80 GB, 45 for A100 40 GB); attention counts as in PaLM, there and here
    j  Megatron-LM, arXiv:1909.08053, abstract: 39 TFLOP/s on one V100, "30% of peak FLOPs"
    k  NVIDIA's data sheets of V100 and L4; NVIDIA Ada GPU architecture, appendix A (RTX 4090)
    m  our own run (docs/measured/h200): FSDP2 with 1 B parameters reaches 0.42 to 0.43 with micro-batches of 24 or more
       rows of 1024 tokens and nothing recomputed; copies between the GPU and pinned memory, 54.9 GB/s (pageable: 7.8 to
       the GPU, 12.9 from it)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPreset:
    """One device of a node that has ``gpus_per_node`` of them.

    Args:
        memory: bytes, in the vendor's decimal units (80 GB are 80e9).
        flops: dense peak FLOP/s by precision.
        efficiency: share of the peak that a training step reaches (HFU: recomputation counts).
        memory_bandwidth: bytes/s of the device's own memory.
        intra_node_bandwidth: bytes/s that a device sends to others of its node in a collective.
        inter_node_bandwidth: bytes/s of a device's share of its node's network.
        host_link: bytes/s between a device and its host.
        product: regular expression that matches the driver's name for this device, but not the names of slower
            variants, such as PCIe cards and shares of a device.
        plausible: names of fields that were not measured on this device.
        sources: letters from the list in the module's docstring.
    """

    memory: float
    flops: Mapping[str, float]
    efficiency: float
    memory_bandwidth: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    host_link: float
    product: str
    gpus_per_node: int = 8
    plausible: tuple[str, ...] = ()
    sources: str = ""


def _flops(half: float, single: float, *, bf16: bool = True) -> dict[str, float]:
    return {**({"bf16": half * 1e12} if bf16 else {}), "fp16": half * 1e12, "fp32": single * 1e12}


GPUS: dict[str, GpuPreset] = {
    "a100-80": GpuPreset(
        memory=80e9, flops=_flops(312, 19.5), efficiency=0.63, memory_bandwidth=2.0e12,
        intra_node_bandwidth=235e9, inter_node_bandwidth=22.7e9, host_link=25e9,
        product="NVIDIA A100-SXM4-80GB", sources="abefi",
    ),
    "a100-40": GpuPreset(
        memory=40e9, flops=_flops(312, 19.5), efficiency=0.59, memory_bandwidth=1.6e12,
        intra_node_bandwidth=235e9, inter_node_bandwidth=22.7e9, host_link=25e9,
        product="NVIDIA A100-SXM4-40GB", sources="abefi",
    ),
    "h100": GpuPreset(
        memory=80e9, flops=_flops(989, 67), efficiency=0.42, memory_bandwidth=3.35e12,
        intra_node_bandwidth=370e9, inter_node_bandwidth=47e9, host_link=52.8e9,
        product="NVIDIA H100 80GB HBM3", sources="acdfi",
    ),
    "h200": GpuPreset(
        memory=141e9, flops=_flops(989, 67), efficiency=0.42, memory_bandwidth=4.8e12,
        intra_node_bandwidth=370e9, inter_node_bandwidth=47e9, host_link=54.9e9, product="NVIDIA H200", sources="acdm",
    ),
    "l4": GpuPreset(
        memory=24e9, flops=_flops(121, 30.3), efficiency=0.42, memory_bandwidth=0.3e12,
        intra_node_bandwidth=10e9, inter_node_bandwidth=1.5e9, host_link=25e9,
        product="NVIDIA L4",
        plausible=("efficiency", "intra_node_bandwidth", "inter_node_bandwidth", "host_link"), sources="hk",
    ),
    "l40s": GpuPreset(
        memory=48e9, flops=_flops(362, 91.6), efficiency=0.42, memory_bandwidth=0.86e12,
        intra_node_bandwidth=10e9, inter_node_bandwidth=5.9e9, host_link=25e9,
        product="NVIDIA L40S",
        plausible=("efficiency", "intra_node_bandwidth", "inter_node_bandwidth", "host_link"), sources="ah",
    ),
    "rtx4090": GpuPreset(
        memory=24e9, flops=_flops(165.2, 82.6), efficiency=0.42, memory_bandwidth=1.008e12,
        intra_node_bandwidth=10e9, inter_node_bandwidth=1.5e9, host_link=25e9,
        product="NVIDIA GeForce RTX 4090", plausible=("efficiency", "inter_node_bandwidth", "host_link"), sources="hk",
    ),
    "v100": GpuPreset(
        memory=32e9, flops=_flops(125, 15.7, bf16=False), efficiency=0.30, memory_bandwidth=0.9e12,
        intra_node_bandwidth=120e9, inter_node_bandwidth=5.6e9, host_link=12e9,
        product=r"(NVIDIA |Tesla )V100-SXM2-\d+GB",
        plausible=("intra_node_bandwidth", "inter_node_bandwidth"), sources="agjk",
    ),
    "mi300x": GpuPreset(
        memory=192e9, flops=_flops(1300, 163.4), efficiency=0.27, memory_bandwidth=5.3e12,
        intra_node_bandwidth=313e9, inter_node_bandwidth=47e9, host_link=52.8e9,
        product=r"AMD Instinct MI300X( OAM)?",
        plausible=("efficiency", "inter_node_bandwidth", "host_link"), sources="ab",
    ),
}  # fmt: skip
"""Presets by name.

Plausible values: L4, L40S and RTX 4090 reach the same share of their peak as H100, their links
are PCIe 4.0 (issue 307), and their network has 100, 400 and 100 Gbit/s for a node of eight; V100's links reach four
fifths of their line rate, as measured for A100 and H100, and its node has four NICs of 100 Gbit/s; MI300X reaches less
of its peak than H100, in proportion to their largest measured matmuls (0.51 against 0.80).
"""


def find_gpu(name: str) -> GpuPreset:
    """Return a preset.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in GPUS:
        raise ValueError(f"gpu is {name!r}. Write one of: {', '.join(GPUS)}; or state --gpu-memory and --gpu-tflops.")
    return GPUS[name]


def find_product(name: str) -> str | None:
    """Return the name of the preset for a device whose driver calls it ``name``, or None if there is none."""
    return next((preset for preset, gpu in GPUS.items() if re.fullmatch(gpu.product, name)), None)


def peak_flops(name: str, precision: str) -> float:
    """Return a preset's peak in a precision.

    Raises:
        ValueError: the device does not support it.
    """
    flops = find_gpu(name).flops
    if precision not in flops:
        raise ValueError(f"{name} has no {precision}. Write one of: {', '.join(flops)}.")
    return flops[precision]
