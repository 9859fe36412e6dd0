"""Memory of model states, compared with published tables."""

from __future__ import annotations

import pytest

from tutorial_lib.theory import memory
from tutorial_lib.theory.memory import DEEPSPEED_FP32, FP32, MIXED, Precision, model_states

GB = 10**9


@pytest.mark.parametrize(("stage", "published"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_figure_1_of_the_zero_paper(stage: int, published: float) -> None:
    """arXiv:1910.02054, figure 1: 7.5 B parameters on 64 ranks, in GB of 10^9 bytes."""
    assert round(model_states(7_500_000_000, stage, 64).total / GB, 1) == published


@pytest.mark.parametrize(
    ("stage", "mixed", "fp32"),
    [
        (0, (2, 2, 12), (4, 4, 8)),
        (1, (2, 2, 12 / 8), (4, 4, 8 / 8)),
        (2, (2, 2 / 8, 12 / 8), (4, 4 / 8, 8 / 8)),
        (3, (2 / 8, 2 / 8, 12 / 8), (4 / 8, 4 / 8, 8 / 8)),
    ],
)
def test_each_stage_divides_its_states(stage: int, mixed: tuple[float, ...], fp32: tuple[float, ...]) -> None:
    num_params = 8_000
    for precision, per_param in ((MIXED, mixed), (FP32, fp32)):
        states = model_states(num_params, stage, 8, precision)
        assert (states.parameters, states.gradients, states.optimizer) == tuple(num_params * b for b in per_param)
        assert states.total == sum(states.to_dict().values())


@pytest.mark.parametrize(
    ("stage", "precision", "per_parameter"),
    [(0, FP32, 12), (0, MIXED, 14), (1, MIXED, 14), (2, DEEPSPEED_FP32, 16), (3, MIXED, 12), (3, DEEPSPEED_FP32, 12)],
)
def test_a_checkpoint_holds_each_state_once(stage: int, precision: Precision, per_parameter: int) -> None:
    """``make bench`` and ``tests/distributed`` compare it with files."""
    assert memory.checkpoint_bytes(1_000, stage, precision) == 1_000 * per_parameter
    with pytest.raises(ValueError, match="stage is 4"):
        memory.checkpoint_bytes(1_000, 4, precision)


def savings_ratio(stage: int, num_ranks: int) -> float:
    """Return how many times smaller a rank's model states are than under plain data parallelism."""
    num_params = num_ranks * 1000
    replicated, sharded = (memory.model_states(num_params, each, num_ranks, memory.MIXED).total for each in (0, stage))
    return replicated / sharded


@pytest.mark.parametrize(
    ("num_ranks", "stage_1", "stage_2", "stage_3"), [(2, 1.60, 1.78, 2.0), (4, 2.29, 2.91, 4.0), (8, 2.91, 4.27, 8.0)]
)
def test_savings_depend_on_the_number_of_ranks(num_ranks: int, stage_1: float, stage_2: float, stage_3: float) -> None:
    ratios = [round(savings_ratio(stage, num_ranks), 2) for stage in memory.STAGES]
    assert ratios == [1.0, stage_1, stage_2, stage_3]


def test_the_quoted_4x_and_8x_are_limits() -> None:
    assert savings_ratio(1, 1_000_000) == pytest.approx(4, rel=1e-4)
    assert savings_ratio(2, 1_000_000) == pytest.approx(8, rel=1e-4)


def test_shares_are_padded_to_be_equal() -> None:
    assert memory.partition_elements(10, 4) == 3
    assert memory.partition_elements(10, 4, alignment=2) == 4
    assert memory.partition_elements(12, 4) == 3
    assert memory.partitioned_elements([10, 1, 4], 4) == 3 + 1 + 1
    assert model_states(10, 3, 4, Precision(1, 1, 1)).total == 9


@pytest.mark.parametrize(
    ("stage", "offload", "device", "host"),
    [
        (1, "none", (2, 2, 3), (0, 0, 0)),
        (1, "optimizer", (2, 2, 0), (0, 1, 3)),
        (2, "optimizer", (2, 0, 0), (0, 1, 3)),
        (3, "optimizer", (0.5, 0, 0), (0, 1, 3)),
        (3, "all", (0, 0, 0), (0.5, 1, 3)),
    ],
)
def test_offload_moves_states_to_the_host(
    stage: int, offload: str, device: tuple[float, ...], host: tuple[float, ...]
) -> None:
    arguments = (1000, stage, 4, MIXED, offload)
    assert tuple(memory.device_states(*arguments).to_dict().values()) == tuple(1000 * x for x in device)
    assert tuple(memory.host_states(*arguments).to_dict().values()) == tuple(1000 * x for x in host)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 4, 2), "stage is 4"),
        ((0, 1, 2), "at least 1"),
        ((1000, 0, 2, MIXED, "optimizer"), "needs stage 1, 2 or 3"),
        ((1000, 2, 2, MIXED, "all"), "needs stage 3"),
        ((1000, 2, 2, MIXED, "disk"), "Write one of: none, optimizer, all"),
    ],
)
def test_impossible_states_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory.device_states(*arguments)


def test_deepspeed_keeps_a_master_copy_in_fp32() -> None:
    assert DEEPSPEED_FP32.total == FP32.total + 4


def test_tensor_parallelism_does_not_divide_replicated_parameters() -> None:
    assert memory.tensor_parallel_params(1000, 200, 4) == 200 + 200
    assert memory.tensor_parallel_params(1000, 0, 4) == 250
    assert memory.tensor_parallel_params(1000, 200, 1) == 1000
