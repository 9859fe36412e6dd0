"""Predictions for runs: peaks of memory, compared with those of real runs, and seconds per step."""

from __future__ import annotations

import json

import pytest

from tutorial_lib.config import Config
from tutorial_lib.engine.deepspeed.config import apply_file
from tutorial_lib.engine.predictions import predict_step_peak, predict_step_seconds, workload_and_layout
from tutorial_lib.models.dimensions import read_config
from tutorial_lib.theory.cost import evaluate
from tutorial_lib.theory.hardware import find_product
from tutorial_lib.theory.layouts import Cluster
from tutorial_lib.theory.peak_memory import part_of_model, phase_peaks
from tutorial_lib.theory.state_bytes import layout_states

MIB = 2**20


def hugging_face(**flat) -> Config:
    """Return a run of lesson 05, on which the peaks below were measured."""
    own = {
        "engine": "trainer", "model": "embedded/bloom", "dataset": "embedded/qa", "seq_length": 128, "dp": 2,
        "global_batch": 16, "micro_batch": 4,
    }  # fmt: skip
    return apply_file(Config.create("cpu", **(own | flat)))


@pytest.mark.parametrize(
    ("flat", "measured_mib"),
    [
        ({"dp": 1}, 35.08),
        ({"dp": 1, "precision": "bf16"}, 34.95),
        ({"deepspeed": "zero0"}, 35.07),
        ({"deepspeed": "zero1"}, 35.11),
        ({"deepspeed": "zero1_cpu_offload"}, 35.11),
        ({"deepspeed": "zero2"}, 34.32),
        ({"deepspeed": "zero2", "precision": "bf16"}, 30.95),
        ({"deepspeed": "zero3"}, 35.30),
        ({"deepspeed": "zero3_cpu_offload"}, 35.05),
    ],
)
def test_peaks_of_the_hugging_face_trainer_are_predicted(flat, measured_mib):
    assert predict_step_peak(hugging_face(**flat)) == pytest.approx(measured_mib * MIB, rel=0.04)


@pytest.mark.parametrize(
    ("stated", "measured_mib"),
    [("auto", 25.1), (None, 1928.5)],  # DeepSpeed's bucket has 500 million elements, whatever the model's size
)
def test_a_file_may_leave_its_bucket_to_the_trainer_or_to_deepspeed(tmp_path, stated, measured_mib):
    zero = {"stage": 2} | ({} if stated is None else {"reduce_bucket_size": stated})
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(dict.fromkeys(batch, "auto") | {"zero_optimization": zero}))
    predicted = predict_step_peak(hugging_face(deepspeed=str(file), seq_length=96))
    assert predicted == pytest.approx(measured_mib * MIB, rel=0.05)


@pytest.mark.parametrize(
    ("sub_group_size", "measured"),
    [(1_000_000_000, 8_319_800), (300_000, 4_026_320), (1000, 2_359_496)],  # all, part, and only the embedding
)
def test_a_file_sets_how_much_stage_3_updates_at_a_time(tmp_path, sub_group_size, measured):
    """Measured on one CPU rank in bf16, where all else is small."""
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "sub_group_size": sub_group_size, "reduce_bucket_size": 200_000}
    file.write_text(json.dumps({"zero_optimization": zero}))
    small = {"model": "embedded/gpt2", "precision": "bf16", "seq_length": 8, "global_batch": 1}
    config = apply_file(Config.create("cpu", dp=1, deepspeed=str(file), **small))
    assert predict_step_peak(config) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("flat", "copies"),
    [
        ({"engine": "torch"}, True), ({"engine": "trainer"}, True), ({"engine": "trainer", "dp": 2}, True),
        ({"engine": "fsdp", "sharding": "no_shard"}, False),
        ({"engine": "fsdp", "sharding": "no_shard", "dp": 2}, False),
    ],
)  # fmt: skip
def test_only_an_adamw_that_is_not_fused_copies_all_parameters(flat, copies):
    config = Config.create("gpu", model="embedded/gpt2", **flat)
    workload, layout = workload_and_layout(config, *read_config("embedded/gpt2"))
    part = part_of_model(workload.dimensions, workload.num_params)
    *_, update = phase_peaks(workload, layout, part, layout_states(workload, layout, part.params, 1, layout.dp), 1)
    norm = 8 * workload.dimensions.vocabulary * workload.dimensions.hidden
    assert update.buffers == (4 * workload.num_params if copies else norm)


def test_a_model_sharded_at_load_has_no_prediction():
    sharded = hugging_face(shard_at_load=True)
    assert predict_step_peak(sharded) is None and predict_step_seconds(sharded, ranks("NVIDIA H200")) is None


def ranks(*devices: str, on_node: int = 2) -> list[dict[str, object]]:
    """Return the entries of two ranks in ``result.json``, with the same kind of device or one kind each."""
    return [{"device": device, "ranks_on_node": on_node} for device in (devices * 2)[:2]]


def test_seconds_are_the_planners_for_these_devices():
    config = apply_file(Config.create("cpu", dp=2, zero_stage=2, precision="bf16", model="embedded/gpt2"))
    workload, layout = workload_and_layout(config, *read_config("embedded/gpt2"))
    one_node, two_nodes = (
        evaluate(workload, Cluster.of("h100", 2, "bf16", gpus_per_node=per_node), layout).seconds for per_node in (2, 1)
    )
    assert predict_step_seconds(config, ranks("NVIDIA H100 80GB HBM3")) == one_node
    assert predict_step_seconds(config, ranks("NVIDIA H100 80GB HBM3", on_node=1)) == two_nodes > one_node


@pytest.mark.parametrize(
    "devices",
    [
        ("cpu",),
        ("NVIDIA H100 PCIe",),  # slower than the preset, without NVLink
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb",),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
        ("Tesla V100-SXM2-32GB",),  # has no bf16
    ],
)
def test_unknown_or_mixed_devices_have_no_predicted_seconds(devices):
    config = apply_file(Config.create("cpu", dp=2, precision="bf16", model="embedded/gpt2"))
    assert predict_step_seconds(config, ranks(*devices)) is None


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("Tesla V100-SXM2-16GB", "v100"),
        ("AMD Instinct MI300X", "mi300x"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
    ],
)  # fmt: skip
def test_presets_are_found_by_the_drivers_name(name, preset):
    assert find_product(name) == preset
