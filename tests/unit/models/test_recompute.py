"""Selective activation checkpointing: equal gradients, with every second product recomputed, but not attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tutorial_lib.models import load_config, set_activation_checkpointing

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Calls(TorchDispatchMode):
    """Counter for calls of matrix products and of the fused attention kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in PRODUCTS
        self.attention += func is ATTENTION
        return func(*args, **kwargs or {})


def gradients(
    family: str, recompute: str | None, hook: Callable[..., None] | None = None
) -> tuple[list[torch.Tensor], Calls]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(load_config(f"embedded/{family}")).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # biases, too
    for module in model.modules() if hook else ():
        module.register_forward_hook(hook)
    if recompute:
        set_activation_checkpointing(model, recompute)
    with Calls() as calls:
        model(input_ids=torch.arange(64).view(2, 32), use_cache=False).logits.square().mean().backward()
    return [p.grad for p in model.parameters()], calls


@pytest.mark.parametrize(
    ("family", "again", "fused"),
    [
        ("qwen2", 3, True),  # key, output, up: every second of seven
        ("gpt2", 1, True),  # attention's output; the last product of a layer is never needed again
        ("bloom", 1, False),
    ],
)
def test_every_second_product_is_computed_again(
    family: str, again: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # an earlier test may have used ZeRO-3
    plain, once = gradients(family, None)
    selective, counted = gradients(family, "selective")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(selective, plain, strict=True))
    layers = load_config(f"embedded/{family}").num_hidden_layers
    assert counted.products - once.products == again * layers
    assert once.attention == (layers if fused else 0) and counted.attention == once.attention
    _, everything = gradients(family, "full")
    assert everything.products > counted.products and everything.attention == 2 * once.attention


@pytest.mark.parametrize("family", ["qwen2", "bloom"])
def test_a_linear_function_that_adds_its_bias_in_place(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's function adds it in place, and replaces PyTorch's once ZeRO-3 has built a model in this process."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    plain, _ = gradients(family, None)
    selective, _ = gradients(family, "selective")
    for ours, theirs in zip(selective, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert torch.nn.functional.linear is zero3_linear_wrap


def test_hooks_may_run_other_operators_in_the_second_forward() -> None:
    """ZeRO-3 gathers a parameter in a hook only if the rank does not hold it, which the first forward may change."""
    calls: Counter[torch.nn.Module] = Counter()

    def hook(module: torch.nn.Module, *_: object) -> None:
        calls[module] += 1
        if calls[module] == 2:
            torch.arange(4).cumsum(0)  # two operators that no layer calls

    plain, _ = gradients("gpt2", None)
    selective, _ = gradients("gpt2", "selective", hook)
    assert max(calls.values()) == 2, "no module ran twice"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(selective, plain, strict=True))
