"""Expected model states, where engines differ from the paper. ``test_bench.py`` compares them with real runs."""

from __future__ import annotations

import pytest

from tutorial_lib.config import Config, EngineConfig, ModelConfig
from tutorial_lib.engine.expected_states import ParameterSizes, expected_states, on_device, parameter_sizes

SIZES = ParameterSizes((600, 200, 200))
PSI = 1000


def states(**flat) -> list[tuple[int, int, int]]:
    """Return the bytes of parameters, gradients and optimizer states on each rank, for a model of 1000 parameters."""
    expected = expected_states(Config.create("cpu", **{"dp": 2} | flat), SIZES)
    assert expected is not None
    return [(each.parameters, each.gradients, each.optimizer) for each in expected]


@pytest.mark.parametrize(
    ("flat", "by_rank"),
    [
        ({"engine": "torch", "dp": 1}, [(4000, 4000, 8000)]),
        ({"zero_stage": 0}, [(4000, 4000, 8000)] * 2),
        ({"zero_stage": 0, "precision": "bf16"}, [(2000, 2000, 12000)] * 2),
        # The first parameter lies across the border between the two shares, so both ranks hold its full gradient.
        ({"zero_stage": 1}, [(4000, 2400, 6000), (4000, 4000, 6000)]),
        ({"zero_stage": 2, "precision": "bf16"}, [(2000, 1200, 6000), (2000, 2000, 6000)]),
        ({"zero_stage": 1, "micro_batch": 1}, [(4000, 4000, 6000)] * 2),
        ({"zero_stage": 2, "offload": "optimizer", "precision": "bf16"}, [(2000, 2000, 6000)] * 2),
        ({"zero_stage": 3}, [(2000, 2000, 6000)] * 2),
        ({"zero_stage": 3, "offload": "all", "precision": "bf16"}, [(1000, 2000, 6000)] * 2),
        ({"engine": "fsdp"}, [(2000, 2000, 4000)] * 2),
        ({"engine": "fsdp", "sharding": "no_shard", "precision": "bf16"}, [(4000, 4000, 8000)] * 2),
        ({"engine": "fsdp", "sharding": "hybrid_shard", "shard_size": 2, "dp": 4}, [(2000, 2000, 4000)] * 4),
    ],
)
def test_bytes_by_rank(flat, by_rank):
    assert states(**flat) == by_rank


def test_frozen_parameters_are_held_and_not_trained():
    (each,) = expected_states(Config.create("cpu", engine="torch", dp=1), ParameterSizes((600,), (400,))) or ()
    assert (each.parameters, each.gradients, each.optimizer) == (4000, 2400, 4800)


def test_tensor_parallelism_has_no_prediction():
    assert expected_states(Config.create("cpu", model="embedded/qwen2", dp=1, tp=2), SIZES) is None


def test_offload_leaves_on_the_device_what_forward_and_backward_need():
    kept = {}
    for stage, offload in ((1, "none"), (1, "optimizer"), (2, "optimizer"), (3, "all")):
        config = Config.create("gpu", zero_stage=stage, offload=offload)
        (each,) = expected_states(config, SIZES) or ()
        left = on_device(config.engine, each)
        kept[stage, offload] = (left.parameters, left.gradients, left.optimizer)
    assert kept == {
        (1, "none"): (2000, 2000, 12000), (1, "optimizer"): (2000, 2000, 0), (2, "optimizer"): (2000, 0, 0),
        (3, "all"): (0, 0, 0),
    }  # fmt: skip


def test_sizes_count_tied_parameters_once():
    sizes = parameter_sizes(ModelConfig(freeze=("*.wpe.weight",)), EngineConfig())
    assert sum(sizes.trained) + sum(sizes.frozen) == 693_312 and sizes.frozen == (512 * 96,)


def test_stage_3_keeps_parameters_of_just_the_threshold_in_full():
    """Vectors of GPT-2's width: six per layer (norms and the biases of both output layers), and the last norm's two."""
    sizes = [parameter_sizes(ModelConfig(), EngineConfig(persistence_threshold=size)) for size in (95, 96)]
    assert [each.persistent for each in sizes] == [0, (6 * 4 + 2) * 96]
