"""Context parallelism: one sequence divided over ranks, and the exchanges that attention then needs.

Each of c ranks holds s / c tokens, so activations and logits shrink by c. Attention needs every key and value:

- **Ring** (arXiv:2310.01889): in forward, each rank passes on keys and values ``c - 1`` times, one rank's share at a
  time. In backward they travel again, with their gradients. This works for any number of heads, and overlaps with
  attention.
- **Ulysses** (arXiv:2309.14509) uses all-to-alls to turn a share of the tokens with all heads into all tokens with a
  share of the heads, and back. It sends less, in particular on many ranks, but attention waits for it. c must divide
  the query heads; with fewer key and value heads, ranks get copies of them.

DeepSpeed implements Ulysses (``deepspeed.runtime.sequence_parallel.ulysses_sp``), and PyTorch implements the ring
(``torch.distributed.tensor.experimental.context_parallel``). The planner considers Ulysses for DeepSpeed, and both for
FSDP2. It does not count the memory of copied keys and values.

Parameters are gathered and gradients reduced over all data-parallel and context-parallel ranks together, as if they
were all data-parallel ranks (torchtitan: ``dp_shard_cp``). We checked none of this with runs of our own, because this
course's engines lack context parallelism. docs/planner-errors.md compares the ring's memory with published runs.
"""

from __future__ import annotations


def ring_elements(tokens: float, key_value_width: int, ranks: int, *, recompute: bool = False) -> float:
    """Return the elements that a rank sends per layer for one micro-batch: in forward, and twice as much in backward.

    Args:
        tokens: tokens of the micro-batch on this rank (s / c).
        key_value_width: width of all keys together. All values together are as wide.
        ranks: c, the context-parallel size.
        recompute: whether forward runs again before backward.
    """
    return (3 + recompute) * 2 * tokens * key_value_width * (ranks - 1)


def ulysses_elements(tokens: float, width: int, key_value_width: int, ranks: int, *, recompute: bool = False) -> float:
    """Return the elements that a rank sends per layer for one micro-batch: attention's inputs and output, both ways.

    Args:
        tokens: tokens of the micro-batch on this rank (s / c).
        width: width of all queries together. Attention's output is as wide.
        key_value_width: width of all keys together, copies included. All values together are as wide.
        ranks: c, the context-parallel size.
        recompute: whether the exchange runs again before backward.
    """
    return (2 + recompute) * tokens * (2 * width + 2 * key_value_width) * (ranks - 1) / ranks
