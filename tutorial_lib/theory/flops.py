"""FLOPs of a training step: floating-point operations per token.

Sources:
    PaLM, arXiv:2204.02311, appendix B (6 N + 12 L h s FLOPs per token)
    Scaling Laws for Neural Language Models, arXiv:2001.08361 (6 N)

Assumptions: only matrix products take time; attention counts all positions (PaLM's convention: a causal kernel only
computes half of them, so long sequences look more efficient than they are, here and in the published figures).
Checked: against PyTorch's FLOP counter and PaLM's published MFU in ``tests/unit/theory/test_flops.py``.
"""

from __future__ import annotations


def flops_per_token(num_params: int, num_layers: int, hidden: int, seq_length: int) -> int:
    """Return the floating-point operations of forward and backward for one token: ``6 N + 12 L h s``.

    This is six per parameter (a multiply and an add, in three passes), plus attention over all heads and ``seq_length``
    positions, without the factor of one half that a causal mask could save (arXiv:2204.02311). Embeddings count as if
    they were multiplied, which is right for tied ones (their second use is the output layer).

    Args:
        num_params: parameters of the model.
        num_layers: L, the number of layers.
        hidden: h, all heads together.
        seq_length: s, in tokens.
    """
    return 6 * num_params + 12 * num_layers * hidden * seq_length
