"""FSDP without a second process: the values of its shards, and refusals."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from tutorial_lib.config import Config, ConfigError, EngineConfig, ModelConfig
from tutorial_lib.embedded import MODEL_NAMES, model_directory
from tutorial_lib.engine.fsdp import sharding, tensor_parallel, weights
from tutorial_lib.models import build_model
from tutorial_lib.models.dimensions import from_config
from tutorial_lib.models.meta import model_outline
from tutorial_lib.theory.peak_memory import part_of_model


@pytest.mark.parametrize("random_init", [False, True])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_filled_outline_is_the_model_bit_for_bit(name, random_init):
    """Without a process group, every slice is the full tensor."""
    config = Config.create("cpu", engine="fsdp", model=name, random_init=random_init, seed=5)
    outline, model = model_outline(config.model, config.engine), build_model(config)
    weights.fill_model(outline, config.model, seed=config.run.seed, device=torch.device("cpu"), host=False)
    filled = dict(outline.named_parameters())
    assert filled.keys() == dict(model.named_parameters()).keys()
    assert all(filled[n].equal(p) for n, p in model.named_parameters())
    buffers = dict(outline.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(buffers[n].equal(b) for n, b in model.named_buffers())
    assert outline.get_input_embeddings().weight is outline.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held, name: held.pop(name), r"lack 1 of its parameters: transformer\.ln_f\.bias"),
        (lambda held, name: held.update({name: torch.zeros(5)}), r"ln_f\.bias as \[5\] in place of \[96\]"),
    ],
)
def test_files_that_do_not_fit_the_configuration_are_refused(tmp_path, change, message):
    shutil.copytree(model_directory("embedded/gpt2"), tmp_path / "wrong")
    held = load_file(tmp_path / "wrong" / "model.safetensors")
    change(held, next(name for name in held if name.endswith("ln_f.bias")))
    save_file(held, tmp_path / "wrong" / "model.safetensors", {"format": "pt"})
    config = Config.create("cpu", engine="fsdp", model=str(tmp_path / "wrong"))
    with pytest.raises(ConfigError, match=message):
        outline = model_outline(config.model, config.engine)
        weights.fill_model(outline, config.model, seed=config.run.seed, device=torch.device("cpu"), host=False)


def test_a_family_without_a_plan_is_refused():
    model = model_outline(ModelConfig(), EngineConfig(name="fsdp"))
    model.config.model_type = "opt"
    with pytest.raises(ConfigError, match="no tensor-parallel plan for 'opt' models, only for gpt2, qwen2, bloom"):
        tensor_parallel.split_model(model, mesh=None)


@pytest.mark.parametrize("tied", [True, False])
def test_the_planner_counts_what_a_rank_of_a_split_model_holds(tied):
    """A fake process group sends nothing, so one process can split a model as rank 0 of eight."""
    config = Qwen2Config(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, intermediate_size=512,
        vocab_size=8000, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=8)
    try:
        tensor_parallel.split_model(model, dist.init_device_mesh("cpu", (8,), mesh_dim_names=("tp",)))
        held = sum(math.prod(row.after) for row in tensor_parallel.parameter_layouts(model))
    finally:
        dist.destroy_process_group()
    dimensions = from_config(config)
    assert part_of_model(dimensions, dimensions.num_params, 8, engine="fsdp").params == held


@pytest.mark.parametrize(
    ("family", "settings", "layers"),
    [
        ("llama", {}, "LlamaDecoderLayer"),
        ("mamba", {}, "MambaBlock"),
        ("bert", {"is_decoder": True, "num_attention_heads": 2}, "BertLayer"),
    ],
)
def test_layers_are_neither_within_each_other_nor_tied_to_the_rest(family, settings, layers):
    config = AutoConfig.for_model(family, num_hidden_layers=2, hidden_size=64, intermediate_size=128, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert [type(layer).__name__ for layer in sharding.layers_of(model)] == [layers] * 2
