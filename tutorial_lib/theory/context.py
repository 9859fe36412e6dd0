"""Context parallelism: one sequence divided over ranks, and what attention then has to exchange.

Each of c ranks holds s / c tokens, so activations and logits shrink by c. Attention needs every key and value:

- **Ring** (arXiv:2310.01889): keys and values travel round the ring, ``c - 1`` times a rank's share, in forward; in
  backward they travel again, with their gradients. Works for any number of heads, and hides behind attention.
- **Ulysses** (arXiv:2309.14509) turns a share of the tokens with all heads into all tokens with a share of the heads by
  all-to-alls. The planner costs the ring alone.

The parameters are gathered and their gradients reduced over all data-parallel and context-parallel ranks, as if these
were data-parallel ranks (torchtitan: ``dp_shard_cp``). Not checked by a run: this course's engines do not have it; the
memory of published runs is in docs/planner-errors.md.
"""

from __future__ import annotations


def ring_elements(tokens: float, key_value_width: int, ranks: int, *, recompute: bool = False) -> float:
    """Return the elements that a rank sends per layer for one micro-batch: forward, and twice as much in backward.

    Args:
        tokens: of the micro-batch on this rank (s / c).
        key_value_width: width of all keys, and of all values.
        ranks: c.
        recompute: forward runs again before backward.
    """
    return (3 + recompute) * 2 * tokens * key_value_width * (ranks - 1)
