"""A model that config.json calls tied, although its file has a separate output layer, which all engines must train."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.models import MODELS, small_model
from tests.support.torch_runs import config
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import CheckpointError

AFTER = {"torch": "ZeRO-1", "ZeRO-1": "FSDP2", "ZeRO-3": "torch", "FSDP2": "ZeRO-3"}
"""Engine that finishes each engine's run."""

ENGINES = {
    "torch": {},
    "ZeRO-1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO-3": {"engine": "deepspeed", "zero_stage": 3},
    "FSDP2": {"engine": "fsdp"},
}


@pytest.fixture(scope="session")
def own_head(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "own-head"
    small_model("qwen2", directory, **MODELS["qwen2"])
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous()}, path)
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    return str(directory)


@pytest.fixture(scope="session")
def runs(own_head, tmp_path_factory):
    """Run each engine for two of three steps, and finish a copy of each run with a different engine."""
    storage = tmp_path_factory.mktemp("tied")
    flat = {"model": own_head, "max_examples": 40, "launcher": "local"}
    alone = config(storage, name="alone", steps=3, **flat)
    halves = {
        name: config(storage, name=name, steps=3, stop_after=2, **flat, **shape) for name, shape in ENGINES.items()
    }
    done = dict(zip(["alone", *ENGINES], launch.run_all([alone, *halves.values()]), strict=True))
    shutil.copytree(storage, storage / "copy", ignore=shutil.ignore_patterns("alone"))
    given = {"engine": "torch", "stop_after": None, "storage": str(storage / "copy")}
    finished = launch.run_all([halves[name].override(**given | ENGINES[AFTER[name]]) for name in ENGINES])
    return done | {f"{name}, finished": run for name, run in zip(ENGINES, finished, strict=True)}


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_trains_the_output_layer_of_the_file(runs, own_head, name, tmp_path):
    reference, run = runs["torch"], runs[name]
    assert [row["loss"] for row in run.rows] == pytest.approx([row["loss"] for row in reference.rows], rel=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(checkpoint.export(checkpoint.latest(run.directory), tmp_path / "x"))
    assert not exported.config.tie_word_embeddings
    before = AutoModelForCausalLM.from_pretrained(own_head)
    for weight in ("lm_head.weight", "model.embed_tokens.weight"):
        changed = (exported.get_parameter(weight) - before.get_parameter(weight)).abs().max()
        assert 0 < changed < 0.1, f"{weight} was not trained, or is a different weight"


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_with_an_untied_output_layer_resumes_in_another_shape(runs, name):
    run = runs[f"{name}, finished"]
    assert (run.result["status"], run.result["resumed_from"]) == ("completed", 2)
    assert run.result["reshaped_from"]["engine"] == ENGINES[name].get("engine", "torch")
    assert [row["loss"] for row in run.rows] == pytest.approx([row["loss"] for row in runs["alone"].rows], rel=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_a_checkpoint_that_describes_another_model_is_refused(runs, name, tmp_path):
    """Write the checkpoint as older versions did, with a tied configuration beside two different weights."""
    path = checkpoint.directory_of(runs[name].directory, 2)
    settings = path / "model" / "config.json"
    kept = settings.read_text()
    settings.write_text(json.dumps(json.loads(kept) | {"tie_word_embeddings": True}))
    try:
        with pytest.raises(CheckpointError, match=r"holds parameters that .* does not know: lm_head.weight\. Nothing"):
            checkpoint.open_full(path, verified=True)
    finally:
        settings.write_text(kept)


@pytest.mark.parametrize("name", ENGINES)
def test_a_checkpoint_that_lacks_a_parameter_is_refused(runs, name):
    reader = checkpoint.open_full(checkpoint.directory_of(runs[name].directory, 2))
    reader.names = (*reader.names, "model.extra.weight")
    with pytest.raises(CheckpointError, match=r"lacks parameters that .* has: model.extra.weight\. Nothing"):
        reader.check_names()
    assert all(torch.isfinite(reader.parameter(name)).all() for name in reader.names[:-1])
