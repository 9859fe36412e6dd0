"""Tied weights: if config.json says that they are tied, the files decide whether that is true, for every engine."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import MODELS, small_model
from tutorial_lib.config import EngineConfig, ModelConfig
from tutorial_lib.models import load_config, load_model, load_trained_config
from tutorial_lib.models.meta import model_outline


@pytest.fixture(params=["safetensors", "shards", "bin"])
def own_head(request, tmp_path):
    """Write a Qwen2 that claims to be tied, and a file with a separate output layer."""
    directory = tmp_path / "model"
    small_model("qwen2", directory, **MODELS["qwen2"])
    path = directory / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    store(directory, tensors | {"lm_head.weight": embedding.flip(0).contiguous()}, request.param)
    return directory


def store(directory, tensors, kind):
    (directory / "model.safetensors").unlink()
    if kind == "safetensors":
        save_file(tensors, directory / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        files = {name: "b.safetensors" if name == "lm_head.weight" else "a.safetensors" for name in tensors}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in tensors if files[name] == file}, directory / file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_an_untied_output_layer_is_trained(own_head):
    assert load_config(str(own_head)).tie_word_embeddings
    assert not load_trained_config(str(own_head)).tie_word_embeddings
    model = load_model(str(own_head))
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.equal(model.model.embed_tokens.weight.flip(0))
    outline = model_outline(ModelConfig(name=str(own_head)), EngineConfig())
    assert outline.lm_head.weight is not outline.model.embed_tokens.weight


def test_random_weights_depend_only_on_the_configuration(own_head):
    assert load_trained_config(str(own_head), random_init=True).tie_word_embeddings
    model = load_model(str(own_head), random_init=True)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_copy_of_the_embedding_stays_tied(tmp_path, kind):
    """torch.save writes every tied model like this."""
    directory = tmp_path / "model"
    small_model("qwen2", directory, **MODELS["qwen2"])
    tensors = load_file(directory / "model.safetensors")
    store(directory, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, kind)
    assert load_trained_config(str(directory)).tie_word_embeddings
    model = load_model(str(directory))
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


def test_names_of_base_models_and_of_older_files_are_understood(tmp_path):
    """GPT-2's files lack the prefix of the model with a head."""
    directory = tmp_path / "model"
    small_model("gpt2", directory, **MODELS["gpt2"])
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(directory / "model.safetensors").items()}
    store(directory, tensors | {"lm_head.weight": tensors["wte.weight"] + 1}, "safetensors")
    assert not load_trained_config(str(directory)).tie_word_embeddings


def test_unreadable_weight_files_are_reported_by_the_loader(tmp_path):
    directory = tmp_path / "model"
    small_model("qwen2", directory, **MODELS["qwen2"])
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert load_trained_config(str(directory)).tie_word_embeddings
