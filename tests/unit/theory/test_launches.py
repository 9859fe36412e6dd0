"""Time to launch kernels: the floor under a step of a small model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.theory.gpu_runs import PRESET
from tutorial_lib.theory.cost import evaluate
from tutorial_lib.theory.dimensions import Dimensions
from tutorial_lib.theory.known_models import MODELS
from tutorial_lib.theory.launches import FSDP2_SECONDS, ZERO_SECONDS, launch_seconds
from tutorial_lib.theory.layouts import Cluster, Layout, Workload

ONE = Layout(dp=1, tp=1, zero_stage=0, micro_batch=1)


def step(dimensions: Dimensions, layout: Layout, seq_length: int = 128):
    work = Workload(num_params=dimensions.num_params, dimensions=dimensions, seq_length=seq_length, global_batch=8)
    return evaluate(work, Cluster.of(PRESET, layout.gpus, "bf16"), layout)


def test_each_micro_batch_of_a_small_model_takes_as_long_to_launch_whatever_its_size():
    gpt2 = MODELS["gpt2"]
    eight, four = (step(gpt2, replace(ONE, micro_batch=size)) for size in (1, 2))
    assert eight.compute_seconds == four.compute_seconds
    for candidate, count in ((eight, 8), (four, 4)):
        launches = candidate.compute_seconds + candidate.launch_wait_seconds
        assert launches == pytest.approx(count * gpt2.layers * ZERO_SECONDS[0])


def test_a_large_model_does_not_wait():
    assert step(MODELS["llama-2-7b"], ONE, seq_length=4096).launch_wait_seconds == 0


def test_tensor_parallel_traffic_is_sent_while_python_launches():
    """Python only enqueues an all-reduce, so a step that waits for Python waits no longer because of it."""
    split = step(MODELS["gpt2"], replace(ONE, tp=4))
    assert split.tp_seconds > 0 and split.compute_seconds + split.tp_seconds < split.launch_wait_seconds
    assert split.seconds - split.update_seconds == pytest.approx(8 * MODELS["gpt2"].layers * ZERO_SECONDS[0])


@pytest.mark.parametrize(
    ("changes", "per_layer"),
    [
        ({"zero_stage": 2}, ZERO_SECONDS[2]),
        ({"zero_stage": 3}, ZERO_SECONDS[3]),
        ({"strategy": "no_shard"}, ZERO_SECONDS[0]),
        ({"strategy": "full_shard", "zero_stage": 3}, FSDP2_SECONDS),
        ({"strategy": "full_shard", "zero_stage": 3, "checkpointing": "full"}, FSDP2_SECONDS * 4 / 3),
        ({"zero_stage": 1, "checkpointing": "selective"}, ZERO_SECONDS[1] * 4 / 3),
    ],
)
def test_hooks_and_recomputation_add_to_it(changes, per_layer):
    assert launch_seconds(replace(ONE, **changes), 12, 2) == pytest.approx(24 * per_layer)
