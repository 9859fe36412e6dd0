"""Runs in the planner's terms: the predicted peak of a step, beside peaks that real runs have measured."""

from __future__ import annotations

import json

import pytest

from tutorial_lib.config import Config
from tutorial_lib.engine.deepspeed.config import apply_file
from tutorial_lib.engine.predicted_peak import predict_step_peak

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


def test_a_model_sharded_at_load_has_no_prediction():
    assert predict_step_peak(hugging_face(shard_at_load=True)) is None
