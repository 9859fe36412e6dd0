"""Time to launch a step's kernels: a step takes at least this long, however fast the device is.

Without torch.compile or CUDA graphs, Python launches every kernel of every step. DeepSpeed's and FSDP2's hooks around
each module add to that. A small model on a fast device therefore waits for Python, and only a larger micro-batch helps.

Source: our own runs (docs/measured/h200). Where the device waits, the time of a step is proportional to the number of
layers times the number of micro-batches, for models from 0.1 to 1 B parameters. The seconds below fit those runs within
20 % (docs/planner-errors.md, part 5). They depend on the host's processor and on the architecture, but hardly on the
layer's width. They also differ between starts of the same kind of machine: after another start, they were 1.6 times as
long.
Not modelled: launches of tensor-parallel collectives, and the time that selective recomputation spends on each
operator in Python. fp32 needs fewer launches.
"""

from __future__ import annotations

from tutorial_lib.theory.layouts import Layout

ZERO_SECONDS = (4.3e-3, 4.3e-3, 5.4e-3, 14e-3)
"""Seconds per layer and micro-batch, forward and backward, by ZeRO stage. Plain PyTorch takes as long as stage 0."""
FSDP2_SECONDS = 10.5e-3
"""The same for FSDP2, for every strategy that shards."""


def launch_seconds(layout: Layout, layers: int, accumulation: int) -> float:
    """Return the seconds that a rank takes to launch the kernels of a step.

    Args:
        layout: engine, sharding and recomputation. Recomputation repeats the launches of forward, a third of all.
        layers: layers that the rank computes.
        accumulation: micro-batches per step.
    """
    shards_by_fsdp2 = layout.strategy not in (None, "no_shard")
    per_layer = FSDP2_SECONDS if shards_by_fsdp2 else ZERO_SECONDS[layout.zero_stage]
    return accumulation * layers * per_layer * (1 if layout.checkpointing == "none" else 4 / 3)
