"""Persistent buffers: every engine trains with the stored ones, and keeps them in resumes, reshapes and exports."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.support.models import scaled_model
from tests.support.torch_runs import config
from tutorial_lib import checkpoint, launch
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.engine.fsdp import dcp, weights
from tutorial_lib.models import load_model
from tutorial_lib.models.meta import check_stored_weights, model_outline

NAMES = ["model.layers.0.layer_scalar", "model.layers.1.layer_scalar"]


@pytest.fixture
def model(tmp_path):
    scaled_model(tmp_path / "model", scale=0.3)
    return tmp_path / "model"


def change(directory, buffer):
    """Replace the stored buffers, or remove them if ``buffer`` is None."""
    tensors = {name: t for name, t in load_file(directory / "model.safetensors").items() if name not in NAMES}
    tensors |= {} if buffer is None else dict.fromkeys(NAMES, buffer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def scales(model):
    return [float(model.get_buffer(name)) for name in NAMES]


@pytest.mark.parametrize(("random_init", "stored", "expected"), [(False, 0.5, 0.5), (False, None, 1), (True, 0.5, 1)])
def test_fsdp_computes_with_the_buffers_of_the_loaded_model(model, random_init, stored, expected):
    change(model, stored and torch.full((1,), stored))
    run = Config.create("cpu", engine="fsdp", model=str(model), random_init=random_init)
    filled = model_outline(run.model, run.engine)
    weights.fill_model(filled, run.model, seed=run.run.seed, device=torch.device("cpu"), host=False)
    loaded = load_model(str(model), random_init=random_init, seed=run.run.seed)
    assert scales(filled) == scales(loaded) == [expected] * 2
    inputs = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert filled.eval()(inputs).logits.equal(loaded.eval()(inputs).logits)


def test_values_that_a_family_sets_only_while_it_is_built_are_not_drawn_from_unset_memory(tmp_path):
    """Apertus gives its activation function four such parameters."""
    AutoConfig.for_model(
        "apertus", vocab_size=64, num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ).save_pretrained(tmp_path)  # fmt: skip
    run = Config.create("cpu", engine="fsdp", model=str(tmp_path), random_init=True)
    outline = model_outline(run.model, run.engine)
    with pytest.raises(ConfigError, match=r"cannot give model\.layers\.0\.mlp\.act_fn\.\w+ its value"):
        weights.fill_model(outline, run.model, seed=1, device=torch.device("cpu"), host=False)


@pytest.mark.parametrize("engine", ["torch", "fsdp"])
def test_buffers_of_another_shape_are_refused(model, engine):
    change(model, torch.ones(2))
    run = Config.create("cpu", engine=engine, model=str(model), dp=1)
    with pytest.raises(ConfigError, match=r"0\.layer_scalar as \[2\] in place of \[1\]"):
        check_stored_weights(run.model, run.engine)


def exported(run, tmp_path):
    return load_model(str(checkpoint.export(checkpoint.latest(run.directory), tmp_path / "exported")))


@pytest.mark.parametrize(("saved", "resumed"), [("fsdp", "fsdp"), ("fsdp", "torch"), ("torch", "fsdp")])
def test_a_resume_continues_with_the_saved_buffers(model, tmp_path, saved, resumed):
    """The model's own files change after the first start, which shows where buffers come from."""
    launch.run(config(tmp_path, model=str(model), engine=saved, steps=2, stop_after=1))
    change(model, torch.full((1,), 0.7))
    run = launch.run(config(tmp_path, model=str(model), engine=resumed, steps=2))
    assert run.directory.result()["resumed_from"] == 1
    assert scales(exported(run, tmp_path)) == pytest.approx([0.3, 0.3])


def test_a_checkpoint_without_buffers_takes_them_from_the_models_files(model, tmp_path, monkeypatch):
    """Older versions saved parameters only."""
    with monkeypatch.context() as patch:
        patch.setattr(dcp, "persistent_buffers", lambda model: {})
        launch.run(config(tmp_path, model=str(model), engine="fsdp", steps=2, stop_after=1))
    change(model, torch.full((1,), 0.7))
    run = launch.run(config(tmp_path, model=str(model), engine="fsdp", steps=2))
    assert run.directory.result()["resumed_from"] == 1
    assert scales(exported(run, tmp_path)) == pytest.approx([0.7, 0.7])


def test_deepspeed_restores_buffers_that_any_engine_saved(model, tmp_path):
    from tutorial_lib.engine.deepspeed.full_states import FullStates

    run = launch.run(config(tmp_path, model=str(model), engine="torch", steps=1))
    change(model, torch.full((1,), 0.7))
    loaded = load_model(str(model))
    optimizer = torch.optim.AdamW(loaded.parameters())
    engine = SimpleNamespace(module=loaded, optimizer=optimizer)
    replicated = dict.fromkeys(loaded.parameters())
    states = FullStates(engine, optimizer, 0, None, replicated, torch.device("cpu"))
    states.load(checkpoint.open_full(checkpoint.latest(run.directory)))
    assert scales(loaded) == pytest.approx([0.3, 0.3])
