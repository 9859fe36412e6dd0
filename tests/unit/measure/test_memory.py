"""Memory instruments on objects of known size: if they are off by a byte, so is the course."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import torch

from tutorial_lib import trainer
from tutorial_lib.config import Config
from tutorial_lib.measure import memory
from tutorial_lib.models.dimensions import read_config
from tutorial_lib.theory.activations import last_norm, layer_activations

MIB = 1 << 20


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return memory.StateBytes.of({"parameters": tensors}).parameters


def test_views_and_tied_tensors_count_once() -> None:
    a = torch.zeros(100)
    tied = torch.nn.Parameter(a)
    assert num_bytes([a, a.view(10, 10), a[:3], tied]) == 400
    assert num_bytes([a, torch.zeros(100)]) == 800
    assert num_bytes([a.to(torch.bfloat16), torch.zeros(7, dtype=torch.float64)]) == 200 + 56


def test_a_slice_counts_as_the_buffer_that_it_keeps_alive() -> None:
    assert num_bytes([torch.zeros(1000)[:1]]) == 4000


def test_released_and_meta_tensors_hold_nothing() -> None:
    released = torch.zeros(1000)
    released.untyped_storage().resize_(0)
    assert num_bytes([released, torch.zeros(1000, device="meta")]) == 0


def test_each_temporary_tensor_of_a_generator_counts() -> None:
    assert num_bytes(torch.zeros(100) for _ in range(5)) == 5 * 400


def test_states_by_part_and_device() -> None:
    flat = torch.zeros(100)
    states = memory.StateBytes.of(
        {"parameters": [flat[:50]], "gradients": [torch.zeros(10)], "optimizer": [flat[50:], torch.zeros(20)]}
    )
    assert states.to_dict() == {
        "parameters": 400,
        "gradients": 40,
        "optimizer": 80,  # the flat buffer has been counted with the parameters
        "total": 520,
        "by_device": {"cpu": 520},
    }
    with pytest.raises(ValueError, match="gradient"):
        memory.StateBytes.of({"gradient": [flat]})


def test_allocations_of_a_block_to_the_byte() -> None:
    before = torch.zeros(1_000_000)
    with memory.count_allocations() as allocations:
        a = torch.empty(2_500_000)  # 10 MB
        b = torch.empty(1_000_000)  # + 4 MB
        del a, before
        c = torch.empty(500_000)  # - 10 MB, + 2 MB
    assert allocations.peak == {"cpu": 14_000_000}
    assert allocations.remaining == {"cpu": 6_000_000}
    assert b.numel() + c.numel() == 1_500_000


def test_allocations_see_what_an_operator_frees_again() -> None:
    """Only a number remains of (a * a).sum(), but forward holds the product, and backward both factors' gradients."""
    a = torch.ones(1_000_000, requires_grad=True)
    with memory.count_allocations() as allocations:
        (a * a).sum().backward()
    assert 8_000_000 <= allocations.peak["cpu"] < 20_000_000
    assert a.grad is not None and allocations.remaining["cpu"] == 4_000_000


def test_marks_say_what_was_held_at_a_moment() -> None:
    with memory.count_allocations() as allocations:
        allocations.mark()
        a = torch.empty(1_000_000)
        allocations.mark()
        b = torch.empty(500_000)
        del a
        allocations.mark()
    assert [held.get("cpu", 0) for held in allocations.at_marks] == [0, 4_000_000, 2_000_000]
    assert b.numel() == 500_000


def test_without_allocations_there_are_no_entries() -> None:
    with memory.count_allocations() as allocations:
        pass
    assert allocations.peak == allocations.remaining == {}


def test_peak_memory_restarts_and_includes_freed_buffers() -> None:
    cpu = torch.device("cpu")
    before = psutil.Process().memory_info().rss
    memory.reset_peak_memory(cpu)
    torch.ones(64 * 2**20)  # 256 MiB, written and freed
    assert memory.peak_memory(cpu) > before + 200 * 2**20
    memory.reset_peak_memory(cpu)
    assert memory.peak_memory(cpu) < before + 200 * 2**20


@pytest.mark.parametrize("engine", ["torch", "trainer"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_run_records_the_activations_that_the_planner_counts(tmp_path: Path, engine: str, recomputes: bool) -> None:
    """The planner leaves out masks and the statistics of norms and attention, a few percent in a model this small."""
    rows, length = 2, 128
    config = Config.create(
        "cpu", name="activations", storage=str(tmp_path), engine=engine, dp=1, launcher="none", steps=3, evaluate=False,
        global_batch=2 * rows, micro_batch=rows, seq_length=length, batching="max_length", measure=True,
        activation_checkpointing=recomputes,
    )  # fmt: skip
    (rank,) = trainer.train(config).ranks
    gpt2, _ = read_config(config.model.name)
    layer = layer_activations(gpt2, "full" if recomputes else "none", bytes_per_element=4)
    log_probabilities = 4 * gpt2.vocabulary
    counted = rows * length * (gpt2.layers * layer.kept + last_norm(gpt2, 4) + log_probabilities)
    assert rank["measured"]["activation_bytes"] == pytest.approx(counted, rel=0.05)
    assert rank["measured"]["activation_bytes"] < rank["measured"]["peak_bytes"]["cpu"]


def test_a_run_records_the_peak_of_its_measured_step(tmp_path: Path) -> None:
    """With rows twice as long, gradients have the same size, but logits and other activations double."""
    peaks = {}
    for length in (32, 64):
        config = Config.create(
            "cpu", name=f"rows-of-{length}", storage=str(tmp_path), engine="torch", dp=1, launcher="none", steps=3,
            global_batch=2, seq_length=length, batching="max_length", measure=True, evaluate=False,
        )  # fmt: skip
        (rank,) = trainer.train(config).ranks
        peaks[length] = rank["measured"]["peak_bytes"]["cpu"]
        assert peaks[length] >= 4 * rank["measured"]["num_parameters"]
    logits = 4 * 2 * 32 * 2048  # fp32, two rows of 32 tokens, a vocabulary of 2048
    assert logits <= peaks[64] - peaks[32] <= 20 * logits
