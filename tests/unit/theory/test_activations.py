"""Activations that a layer keeps for backward, counted by autograd itself in this course's three models."""

from __future__ import annotations

import pytest

from tutorial_lib.theory.activations import (
    CHECKPOINTING,
    last_norm,
    layer_activations,
    logits_bytes,
    recomputed_share,
    score_traffic,
)
from tutorial_lib.theory.known_models import MODELS


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "bloom"])
def test_a_layer_keeps_what_is_counted(family: str) -> None:
    """There are four sequences of 128 tokens in fp32. Statistics of norms and attention, one percent, are ignored."""
    import torch
    from transformers import AutoModelForCausalLM

    from tutorial_lib.engine.fsdp.sharding import layers_of
    from tutorial_lib.models import load_config
    from tutorial_lib.models.dimensions import from_config

    config = load_config(f"embedded/{family}")
    model = AutoModelForCausalLM.from_config(config).train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    is_inside = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if is_inside and storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def enter(inside: bool) -> None:
        nonlocal is_inside
        is_inside = inside

    layer = layers_of(model)[1]
    layer.register_forward_pre_hook(lambda *_: enter(True))
    layer.register_forward_hook(lambda *_: enter(False))
    tokens = torch.zeros(4, 128, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens, use_cache=False)
    counted = sum(storage.nbytes() for storage in kept.values()) / tokens.numel()
    predicted = layer_activations(from_config(config), bytes_per_element=4, seq_length=128).kept
    assert predicted == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("bits", [16, 32])
def test_attention_without_a_fused_kernel_moves_its_scores(bits: int) -> None:
    """A matrix of scores counts whenever an operator reads or writes it. Views do not count, as they move nothing."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import AutoModelForCausalLM

    from tutorial_lib.models import load_config
    from tutorial_lib.models.dimensions import from_config

    config = load_config("embedded/bloom")
    sequences, tokens = 3, 64
    scores = sequences * config.n_head * tokens**2

    class Moved(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **kwargs or {})
            is_view = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
            touched = [t for t in tree_leaves((args, found)) if isinstance(t, torch.Tensor) and t.numel() == scores]
            self.total += 0 if is_view else sum(t.numel() * t.element_size() for t in touched)
            return found

    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16 if bits == 16 else torch.float32).train()
    with Moved() as moved:
        logits = model(input_ids=torch.ones(sequences, tokens, dtype=torch.long), use_cache=False).logits
        forward = moved.total
        logits.float().sum().backward()
    bloom, per_token = from_config(config), sequences * tokens * config.n_layer
    once, again = (score_traffic(bloom, tokens, how, bits // 8) for how in ("none", "full"))
    assert once == moved.total / per_token and again - once == forward / per_token
    assert score_traffic(MODELS["llama-3-8b"], tokens) == 0


def test_llama_3_8b_in_bf16() -> None:
    """A layer keeps 49 h bytes per token, 15.5 h with torchtitan's selective policy, or 2 h with full recomputation."""
    llama = MODELS["llama-3-8b"]
    assert [layer_activations(llama, how).kept / llama.hidden for how in CHECKPOINTING] == [49, 15.5, 2]
    # Key, output and up projections are computed again: 0.25 + 1 + 3.5 of 13.
    assert recomputed_share(llama, "selective") == pytest.approx((4.75 / 13, 0))
    assert recomputed_share(MODELS["bloom-560m"], "selective")[1] == 1  # no fused kernel, so attention is recomputed
    assert recomputed_share(llama, "full") == (1, 1) and recomputed_share(llama, "none") == (0, 0)


def test_sequence_parallelism_divides_norms() -> None:
    llama = MODELS["llama-3-8b"]
    plain, divided = (layer_activations(llama, tp=8, sequence_parallel=sp).kept for sp in (False, True))
    assert plain - divided == 2 * 6 * llama.hidden * 7 / 8
    assert last_norm(llama) - last_norm(llama, 2, 8, sequence_parallel=True) == 6 * llama.hidden * 7 / 8


def test_the_same_order_as_megatrons_formula() -> None:
    """Megatron keeps 34 h bytes per token, 2 h of them for dropout's masks. With a fused GELU, PyTorch keeps 32 h."""
    gpt = MODELS["gpt2"]
    pytorch = layer_activations(gpt).kept / gpt.hidden
    fused_gelu = pytorch - (5 - 2) * 2 * 4
    assert fused_gelu == 34 - 2


def test_bytes_of_the_logits() -> None:
    assert logits_bytes(100, 1000) == 12 * 100 * 1000
    assert logits_bytes(100, 1000, chunks=8) == 12 * 100 * 1000 / 8
    assert logits_bytes(100, 1000, vocabulary_parallel=8) == 16 * 100 * 1000 / 8
    with pytest.raises(ValueError, match="Write one of: none, selective, full"):
        layer_activations(MODELS["gpt2"], "some")
