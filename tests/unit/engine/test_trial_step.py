"""Trial of an engine: it refuses a model only if the family's code fails, and is skipped if it cannot run."""

from __future__ import annotations

import random
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils import cpp_extension
from transformers import AutoConfig

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.engine import build_engine, trial_step
from tutorial_lib.engine.trial_step import train_copy
from tutorial_lib.mpu import Topology


@pytest.fixture
def config(tmp_path):
    AutoConfig.for_model("llama").save_pretrained(tmp_path / "model")
    return Config.create(model=str(tmp_path / "model"), freeze=("*.k_proj.*", "*.layers.30.*"))


def failing_with(error):
    def build(_config):
        raise error

    return build


def test_a_failure_of_the_familys_code_is_a_refusal(config):
    with pytest.raises(ConfigError, match=r"of type 'llama', cannot be trained with .*fails with IndexError: tuple"):
        train_copy(config, failing_with(IndexError("tuple index out of range")))


@pytest.mark.parametrize(
    "error",
    [dist.DistBackendError("NCCL error"), torch.AcceleratorError("CUDA error"), OSError(28, "No space left on device"),
     torch.OutOfMemoryError("out of memory"), RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")],
)  # fmt: skip
def test_a_failure_of_the_machine_is_not_blamed_on_the_family(config, error):
    with pytest.raises(type(error)) as raised:
        train_copy(config, failing_with(error))
    assert raised.value is error


def test_a_missing_build_tool_is_not_blamed_on_the_family(config, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="Ninja is required"):
        train_copy(config, lambda _: cpp_extension.verify_ninja_availability())


def test_a_rank_that_cannot_write_goes_on_without_a_trial(config, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    train_copy(config, failing_with(IndexError("not reached")))


def test_a_full_disk_is_no_failure(config, monkeypatch):
    def save_nowhere(model, path):
        save_model(model, f"{path}/missing/model.safetensors")

    save_model = trial_step.save_model
    monkeypatch.setattr(trial_step, "save_model", save_nowhere)
    train_copy(config, failing_with(IndexError("not reached")))


def test_a_trial_changes_neither_weights_nor_random_states(tmp_path, monkeypatch):
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    AutoConfig.for_model("llama", vocab_size=100, **sizes).save_pretrained(tmp_path)
    config = Config.create(model=str(tmp_path), engine="torch", dp=1, random_init=True)

    def built():
        engine = build_engine(config, Topology.from_environment(config.parallel), 10)
        weights = {name: parameter.clone() for name, parameter in engine.full_parameters()}
        return weights, torch.rand(4), np.random.random(), random.random()

    tried = built()
    monkeypatch.setattr(trial_step, "TESTED_FAMILIES", {"llama"})
    torch.testing.assert_close(tried, built(), rtol=0, atol=0)


@pytest.mark.parametrize(("given", "expected"), [(0, 0), (100_000, 1000)])
def test_zero_3_splits_the_copys_matrices_and_not_its_vectors_with_a_high_threshold(config, given, expected):
    built = []

    def build(tiny):
        built.append(tiny.engine.persistence_threshold)
        raise ConfigError("enough")

    train_copy(config.override(zero_stage=3, persistence_threshold=given), build)
    assert built == [expected]


def test_the_copy_is_frozen_as_the_model_is(config):
    """With DDP, a family whose unused parameters are frozen can be trained."""
    built = []

    def build(tiny):
        built.append(tiny.model.freeze)
        raise ConfigError("enough")

    train_copy(config, build)
    assert built == [("*.k_proj.*",)], "the copy has no layer 30"
