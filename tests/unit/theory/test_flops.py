"""FLOPs and MFU, compared with published figures and PyTorch's counter."""

from __future__ import annotations

import pytest

from tutorial_lib.theory import flops


def test_flops_per_token() -> None:
    assert flops.flops_per_token(1000, 2, 64, 128) == 6 * 1000 + 12 * 2 * 64 * 128


def test_palm_540b_reaches_the_published_mfu() -> None:
    """arXiv:2204.02311, table 3 and section 4.1: 238.3 K tokens/s on 6144 TPU v4 of 275 TFLOP/s are 46.2 % MFU."""
    # PaLM has 118 layers. Its 48 heads of size 256 (multi-query attention) make h = 12288 in the attention term.
    per_token = flops.flops_per_token(540_350_000_000, 118, 48 * 256, 2048)
    assert 238_300 * per_token / (6144 * 275e12) == pytest.approx(0.462, abs=0.003)


def test_flops_agree_with_pytorchs_counter() -> None:
    """PyTorch counts only matrix products, which is a little less than the formula with its norms and biases."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=500, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    batch = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=batch, labels=batch).loss.backward()
    num_params = sum(p.numel() for p in model.parameters())
    predicted = batch.numel() * flops.flops_per_token(num_params, 2, 64, 64)
    assert 0.90 < counter.get_total_flops() / predicted < 1.0
