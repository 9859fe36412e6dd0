"""Traffic, compared with the volumes in papers, and with DeepSpeed's measured traffic."""

from __future__ import annotations

import pytest

from tutorial_lib.theory import traffic

PSI = 168_192


@pytest.mark.parametrize(("stage", "multiple"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_volume_per_step_matches_the_paper(stage: int, multiple: int) -> None:
    assert traffic.zero_volume(PSI, stage).total == multiple * PSI


@pytest.mark.parametrize(
    ("arguments", "counted"),
    [
        # These were counted in steady state on two ranks with DeepSpeed 0.19.8, for a GPT-2 of PSI elements.
        (dict(stage=0, accumulation=3), 2 * PSI),
        (dict(stage=1, gradient_reduction="all_reduce"), 3 * PSI),
        (dict(stage=1, gradient_reduction="all_reduce", accumulation=3), 3 * PSI),
        (dict(stage=2, gradient_reduction="all_reduce", accumulation=3), 7 * PSI),
        (dict(stage=2, accumulation=3), 4 * PSI),
        (dict(stage=3, parameters_stay=True), 2 * PSI),
        (dict(stage=3, parameters_stay=True, accumulation=3), 6 * PSI),
        (dict(stage=3, accumulation=3), 9 * PSI),
        (dict(stage=3, persistent=1792), 2 * 166_400 + 1792 + PSI),
        (dict(stage=3, persistent=1792, accumulation=3), 1_504_768),
        (dict(stage=3, persistent=1792, accumulation=2, parameters_stay=True), 670_976),
    ],
)
def test_volume_matches_measured_deepspeed_traffic(arguments: dict, counted: int) -> None:
    assert traffic.zero_volume(PSI, **arguments).total == counted


def test_tied_embeddings_are_gathered_for_each_use() -> None:
    tied = 32_000
    assert traffic.zero_volume(136_192, 3, tied=tied).to_dict() == {
        "all_reduce": 0,
        "all_gather": 2 * 168_192,
        "reduce_scatter": 136_192,
    }
    assert traffic.zero_volume(136_192, 3, tied=tied, parameters_stay=True).all_gather == 136_192


@pytest.mark.parametrize(
    ("sharding", "multiple"), [("no_shard", 2), ("shard_grad_op", 2), ("full_shard", 3), ("hybrid_shard", 4)]
)
def test_volume_per_step_of_fsdp(sharding: str, multiple: int) -> None:
    """Hybrid sharding over two ranks adds the all-reduce of half of Psi, which counts as one Psi."""
    size = 2 if sharding == "hybrid_shard" else None
    assert traffic.fsdp_volume(PSI, sharding, shard_size=size).total == multiple * PSI


def test_fsdp_gathers_per_micro_batch_and_reduces_per_step() -> None:
    assert traffic.fsdp_volume(PSI, "full_shard", accumulation=4).to_dict() == {
        "all_reduce": 0,
        "all_gather": 8 * PSI,
        "reduce_scatter": PSI,
    }
    assert traffic.fsdp_volume(PSI, "no_shard", accumulation=4).total == 2 * PSI
    assert traffic.fsdp_volume(PSI, "full_shard", frozen=PSI).reduce_scatter == 0
    with pytest.raises(ValueError, match="hybrid_shard with its shard_size"):
        traffic.fsdp_volume(PSI, "hybrid_shard")


def test_fsdp_reduces_with_every_micro_batch_by_default() -> None:
    assert traffic.fsdp_volume(PSI, "full_shard", accumulation=4, reduce_each=True).total == 12 * PSI
    assert traffic.fsdp_volume(PSI, "shard_grad_op", accumulation=4, reduce_each=True).total == 8 * PSI
    assert traffic.fsdp_volume(PSI, "no_shard", accumulation=4, reduce_each=True).total == 2 * PSI


def test_a_ring_sends_less_than_the_volume() -> None:
    assert traffic.ring_factor("all_reduce", 2) == 1
    assert traffic.ring_factor("all_gather", 4) == traffic.ring_factor("reduce_scatter", 4) == 0.75
    assert traffic.zero_volume(PSI, 3).ring_elements(4) == 0.75 * 3 * PSI
    assert traffic.zero_volume(PSI, 0).ring_elements(1) == 0
    with pytest.raises(ValueError, match="no ring factor for 'broadcast'"):
        traffic.ring_factor("broadcast", 2)
    with pytest.raises(ValueError, match="at least one rank"):
        traffic.ring_factor("all_reduce", 0)


def test_megatron_all_reduces_four_times_per_layer() -> None:
    bsh = 4 * 128 * 64
    assert traffic.tensor_parallel_volume(2, 4, 128, 64, tp=2).to_dict()["all_reduce"] == 2 * 4 * bsh
    assert traffic.tensor_parallel_volume(2, 4, 128, 64, tp=2, recompute=True).all_reduce == 2 * 5 * bsh
    assert traffic.tensor_parallel_volume(2, 4, 128, 64, tp=2, accumulation=3).total == 3 * 2 * 2 * 4 * bsh
    assert traffic.tensor_parallel_volume(2, 4, 128, 64, tp=2, column_layers=5).all_reduce == 2 * 7 * bsh
    assert traffic.tensor_parallel_volume(2, 4, 128, 64, tp=1).total == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(stage=4), "stage is 4"),
        (dict(stage=1, gradient_reduction="gather"), "Write one of: reduce_scatter, all_reduce"),
        (dict(stage=1, accumulation=0), "accumulation is 0"),
    ],
)
def test_impossible_traffic_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        traffic.zero_volume(PSI, **arguments)
