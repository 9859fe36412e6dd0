"""FLOPs and step times against published figures and PyTorch's counter."""

from __future__ import annotations

import pytest

from tutorial_lib.theory import flops, traffic


def test_flops_per_token() -> None:
    assert flops.flops_per_token(1000, 2, 64, 128) == 6 * 1000 + 12 * 2 * 64 * 128


def test_palm_540b_reaches_the_published_mfu() -> None:
    """arXiv:2204.02311, table 3 and section 4.1: 238.3 K tokens/s on 6144 TPU v4 of 275 TFLOP/s are 46.2 % MFU."""
    # Multi-query attention: 118 layers; 48 heads of size 256 make h = 12288 in the attention term.
    per_token = flops.flops_per_token(540_350_000_000, 118, 48 * 256, 2048)
    mfu = flops.utilisation(238_300, per_token, 6144 * 275e12)
    assert mfu == pytest.approx(0.462, abs=0.003)
    assert flops.utilisation(238_300, per_token, 6144 * 275e12, recompute=True) == pytest.approx(mfu * 4 / 3)


def test_flops_agree_with_pytorchs_counter() -> None:
    """PyTorch only counts matrix products: a little less than the formula, which counts norms and biases too."""
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


def test_step_time() -> None:
    time = flops.step_time(
        1_000_000, 4096, 2_000_000, num_devices=4, device_flops=1e12, bandwidth=1e9, bytes_per_element=2
    )
    assert time.compute == 6 * 1e6 * 4096 / 4e12
    assert time.communication == 2e6 * 2 / 1e9
    assert time.bound == "compute" and time.overlapped == time.compute
    assert time.serial == time.compute + time.communication
    recomputed = flops.step_time(1, 1, 0, num_devices=1, device_flops=1, bandwidth=1, recompute=True)
    assert recomputed.compute == 8


def test_data_parallelism_is_compute_bound_above_the_critical_batch() -> None:
    """At the critical number of tokens, backward (4 Psi tokens / FLOP/s) takes as long as the all-reduce."""
    peak, bandwidth, num_params = 400e12, 50e9, 1_000_000
    for size in (2, 4):
        tokens = flops.critical_tokens_per_device(peak, bandwidth, size)
        all_reduce = traffic.zero_volume(num_params, 0).total * size / bandwidth
        assert 4 * num_params * tokens / peak == pytest.approx(all_reduce)
