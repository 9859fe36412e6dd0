"""Pipeline parallelism: the micro-batches that a stage holds at once, and its idle time.

Notation: p pipeline stages, m micro-batches per step, v model chunks per stage (interleaved schedule; 1F1B has 1).

1F1B starts a micro-batch's backward as soon as it can, so stage i (from 0) holds ``min(m, p - i)`` micro-batches, and
the first stage holds at most p. A stage waits for the time of ``p - 1`` micro-batches while the pipeline fills and
drains: a share ``(p - 1) / m`` on top of its compute time. Interleaving divides that by v, and the first stage then
holds at most ``p (1 + (p - 1) / (p v))``.

Sources: Megatron-LM on GPU clusters, arXiv:2104.04473, sections 2.2 and 2.3; for interleaving's memory,
arXiv:2205.05198, section 4.3. Assumptions: all stages take the same time, and messages between them hide behind
compute. We checked none of this with runs of our own, because this course's engines have no pipeline.
"""

from __future__ import annotations


def bubble_share(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Return a stage's idle time as a share of its compute time.

    Args:
        stages: p, the pipeline stages.
        micro_batches: m, the micro-batches per step.
        chunks: v, the model chunks per stage.
    """
    return (stages - 1) / (chunks * micro_batches)


def micro_batches_held(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Return how many micro-batches' activations the first stage holds at its peak (for all of its layers)."""
    if chunks == 1 or stages == 1:
        return min(stages, micro_batches)
    return min(float(micro_batches), stages + (stages - 1) / chunks)
