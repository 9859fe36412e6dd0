"""A model before it has values: the same code and shapes, and the files that hold the values."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.embedded import MODEL_NAMES, model_directory
from tutorial_lib.models import build_model
from tutorial_lib.models.meta import model_outline, weight_files


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_an_outline_is_the_model_without_values(name):
    config = Config.create("cpu", engine="fsdp", model=name, freeze=("*.0.*",), activation_checkpointing=True)
    outline, model = model_outline(config), build_model(config)
    described = [[(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()] for m in (outline, model)]
    assert described[0] == described[1]
    assert all(p.is_meta for p in outline.parameters())
    assert outline.get_input_embeddings().weight is outline.get_output_embeddings().weight


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
