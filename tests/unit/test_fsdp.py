"""What needs no second process: column orders, the outline of a model, where its values are read, refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.embedded import MODEL_NAMES, model_directory
from tutorial_lib.engine.fsdp import tensor_parallel, weights
from tutorial_lib.models import build_model
from tutorial_lib.models.fused_qkv import by_part, by_rank, is_fused_by_part
from tutorial_lib.models.meta import model_outline, weight_files


def test_columns_by_rank_are_those_of_the_picture():
    assert "".join("QqKkVv"[i] for i in by_rank(torch.arange(6), 2).tolist()) == "QKVqkv"


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_columns_find_back(tp):
    weight = torch.arange(5 * 24).view(5, 24)
    assert by_part(by_rank(weight, tp), tp).equal(weight)


@pytest.mark.parametrize("tp", [2, 4])
def test_each_rank_gets_its_heads_of_all_three(tp):
    query, key, value = torch.rand(5, 8), torch.rand(5, 8), torch.rand(5, 8)
    pieces = by_rank(torch.cat([query, key, value], -1), tp).chunk(tp, -1)
    for rank, piece in enumerate(pieces):
        assert piece.equal(torch.cat([part.chunk(tp, -1)[rank] for part in (query, key, value)], -1))


def test_only_gpt2_fuses_by_part():
    assert is_fused_by_part("transformer.h.0.attn.c_attn.bias", "gpt2")
    assert not is_fused_by_part("transformer.h.0.attn.c_proj.bias", "gpt2")
    assert not is_fused_by_part("transformer.h.0.attn.c_attn.bias", "other")


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_an_outline_is_the_model_without_values(name):
    config = Config.create("cpu", engine="fsdp", model=name, freeze=("*.0.*",), activation_checkpointing=True)
    outline, model = model_outline(config), build_model(config)
    described = [[(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()] for m in (outline, model)]
    assert described[0] == described[1]
    assert all(p.is_meta for p in outline.parameters())
    assert outline.get_input_embeddings().weight is outline.get_output_embeddings().weight


@pytest.mark.parametrize("random_init", [False, True])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_filled_outline_is_the_model_bit_for_bit(name, random_init):
    """Without a process group every tensor is whole, and so are its slices."""
    config = Config.create("cpu", engine="fsdp", model=name, random_init=random_init, seed=5)
    outline, model = model_outline(config), build_model(config)
    weights.fill(outline, config, device=torch.device("cpu"), host=False)
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
        (lambda held, name: held.pop(name), r"lack transformer\.ln_f\.bias"),
        (lambda held, name: held.update({name: torch.zeros(5)}), r"ln_f\.bias in the shape \[5\], and .* \[96\]"),
    ],
)
def test_files_that_do_not_fit_the_configuration_are_refused(tmp_path, change, message):
    shutil.copytree(model_directory("embedded/gpt2"), tmp_path / "wrong")
    held = load_file(tmp_path / "wrong" / "model.safetensors")
    change(held, next(name for name in held if name.endswith("ln_f.bias")))
    save_file(held, tmp_path / "wrong" / "model.safetensors", {"format": "pt"})
    config = Config.create("cpu", engine="fsdp", model=str(tmp_path / "wrong"))
    with pytest.raises(ConfigError, match=message):
        weights.fill(model_outline(config), config, device=torch.device("cpu"), host=False)


def test_files_of_a_model_in_one_file_and_in_several(tmp_path):
    whole = weight_files("embedded/gpt2")
    assert set(whole.values()) == {str(model_directory("embedded/gpt2") / "model.safetensors")}
    shutil.copytree(model_directory("embedded/gpt2"), tmp_path / "split")
    weights = load_file(tmp_path / "split" / "model.safetensors")
    (tmp_path / "split" / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: weights[name].contiguous() for name in held}, tmp_path / "split" / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (tmp_path / "split" / "model.safetensors.index.json").write_text(json.dumps(index))
    found = weight_files(str(tmp_path / "split"))
    assert found.keys() == whole.keys()
    assert found[names[1]] == str(tmp_path / "split" / "second.safetensors")


def test_a_model_without_safetensors_is_refused(tmp_path):
    shutil.copytree(model_directory("embedded/gpt2"), tmp_path / "none")
    (tmp_path / "none" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no safetensors file.*random_init=True"):
        weight_files(str(tmp_path / "none"))


def test_a_family_without_a_plan_is_refused():
    model = model_outline(Config.create("cpu", engine="fsdp"))
    model.config.model_type = "opt"
    with pytest.raises(ConfigError, match="no tensor-parallel plan for 'opt' models, only for gpt2, qwen2, bloom"):
        tensor_parallel.split(model, mesh=None)
