"""Trial step: families that an engine cannot train are refused before their weights are read, and others pass."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import AutoConfig

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.embedded import MODEL_NAMES
from tutorial_lib.engine import try_engine
from tutorial_lib.engine.trial_step import TESTED_FAMILIES
from tutorial_lib.lab.ranks import on_ranks
from tutorial_lib.models import load_config
from tutorial_lib.mpu import Topology

ENGINES = {
    "ZeRO-1": {"engine": "deepspeed", "zero_stage": 1, "precision": "bf16"},
    "ZeRO-3": {"engine": "deepspeed", "zero_stage": 3},
    "ZeRO-3 in a file": {"engine": "trainer", "deepspeed": "zero3", "zero_stage": 3},
    "FSDP2": {"engine": "fsdp"},
    "DDP": {"engine": "fsdp", "sharding": "no_shard"},
    "tensor parallel": {"engine": "fsdp", "dp": 1, "tp": 2},
    "split at load": {"engine": "trainer", "shard_at_load": True},
}

OWN_CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.unused = nn.Linear(4, 4)
"""


def tried(directory: Path, family: str, engine: str, batching: str = "longest") -> tuple[str, float]:
    """Try a family with its default sizes on two ranks, and return the error, if any, and the seconds that it takes."""
    model = directory / family
    if family == "own":
        ship_code(model)
    else:
        AutoConfig.for_model(family).save_pretrained(model)
    flat = {"dp": 2, "global_batch": 4, "batching": batching, "trust_remote_code": family == "own"} | ENGINES[engine]
    config = Config.create(model=str(model), **flat)

    def try_it() -> tuple[str, float]:
        os.environ["DS_ACCELERATOR"] = "cpu"
        topology = Topology.from_environment(config.parallel)
        try:
            try_engine(config, topology, 10)
            dist.barrier()
            began = time.perf_counter()
            try_engine(config, topology, 10)  # the libraries have been loaded by now
        except ConfigError as error:
            return str(error), 0.0
        return "", time.perf_counter() - began

    first, second = on_ranks(2, try_it)
    assert first[0] == second[0]
    return first


def ship_code(model: Path) -> None:
    """Write a model that comes with its own code, in which a layer is never used."""
    model.mkdir()
    (model / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (model / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))


@pytest.mark.parametrize(
    ("family", "engine", "reason", "instead"),
    [
        ("rwkv", "ZeRO-3", r"modeling_rwkv\.py, line \d+, fails with IndexError: tuple index", "Try zero_stage=2, or "),
        ("rwkv", "ZeRO-3 in a file", r"modeling_rwkv\.py, line \d+, fails with IndexError", "Try zero_stage=2, or "),
        ("bart", "DDP", "fails with RuntimeError: Expected to have finished reduction", "Try sharding='full_shard', "),
        ("blenderbot", "DDP", "fails with RuntimeError: Expected to have", "Try sharding='full_shard', "),
        ("own", "DDP", "fails with RuntimeError: Expected to have finished reduction", "Try sharding='full_shard', "),
        ("falcon_h1", "split at load", "its logits change when transformers splits it", "Try shard_at_load=False"),
        ("falcon_h1", "FSDP2", r"fails with RuntimeError: .*mixed torch\.Tensor and DTensor", "or engine='deepspeed'"),
    ],
)
def test_a_family_that_the_engine_cannot_train_is_refused(tmp_path, family, engine, reason, instead):
    message, _ = tried(tmp_path, family, engine)
    for expected in (f"of type '{family}', cannot be trained with engine=", reason, instead):
        assert re.search(expected, message), message


@pytest.mark.parametrize(
    ("family", "engine", "batching"),
    [*(("llama", engine, "packed") for engine in ENGINES), ("mamba", "ZeRO-3", "longest"), ("rwkv", "DDP", "longest"),
     ("own", "FSDP2", "longest"), ("bart", "FSDP2", "longest"), ("falcon_h1", "DDP", "longest")],
)  # fmt: skip
def test_a_family_that_the_engine_can_train_passes_quickly(tmp_path, family, engine, batching):
    message, seconds = tried(tmp_path, family, engine, batching)
    assert message == ""
    assert seconds < 10, "a fraction of a second on two idle cores"


def test_the_families_without_a_trial_are_those_of_the_embedded_models():
    assert {load_config(name).model_type for name in MODEL_NAMES} == TESTED_FAMILIES
