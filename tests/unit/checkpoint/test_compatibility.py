"""Compatibility: which settings, models and tokenizers a run may resume with."""

import json
import shutil

import pytest

from tests.unit.checkpoint.runs import assert_same, config
from tutorial_lib import launch
from tutorial_lib.config import ConfigError


def test_every_setting_that_differs_is_named(halved):
    other = halved.config.override(
        seed=1,
        learning_rate=0.5,
        dataset="embedded/articles",
        global_batch=2,
        freeze=("*.wpe.weight",),
        stop_after=None,
    )
    with pytest.raises(ConfigError) as error:
        launch.run(other)
    for part in (
        "seed was 0, now 1",
        "learning_rate was 0.001, now 0.5",
        "dataset was 'embedded/news', now 'embedded/articles'",
        "global_batch was 4, now 2",
        "freeze was [], now ['*.wpe.weight']",
    ):
        assert part in str(error.value)
    assert "another name" in str(error.value)


def test_what_changes_no_update_may_change(halved, unbroken):
    """Recomputed activations drop the same elements: the random state of the first pass is kept."""
    free = {"activation_checkpointing": True, "bucket_size": 5, "checkpoint_every": 0, "stop_after": None}
    assert_same(launch.run(halved.config.override(**free)), unbroken)


def test_another_model_is_named_too(halved):
    with pytest.raises(ConfigError, match=r"model was '.*/dropout', now 'embedded/gpt2'"):
        launch.run(halved.config.override(model="embedded/gpt2", stop_after=None))


@pytest.fixture
def own_model(model, tmp_path):
    """A copy of the model that a test may change, and a run of it."""
    own = tmp_path / "model"
    shutil.copytree(model, own)
    return own, launch.run(config(tmp_path, model=str(own), stop_after=2))


def test_another_model_of_the_same_name_is_refused_before_anything_starts(own_model):
    own, run = own_model
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"n_layer": settings["n_layer"] // 2, "embd_pdrop": 0.2}))
    with pytest.raises(
        ConfigError, match=r"another model.*embd_pdrop was 0.1, now 0.2; n_layer was 2, now 1\."
    ) as error:
        launch.preflight(run.config.override(stop_after=None))
    assert "or give the new run another name" in str(error.value)


def test_another_tokenizer_is_refused_before_anything_starts(own_model):
    """Two tokens exchanged: as many as before, and every text becomes other ids."""
    own, run = own_model
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"another tokenizer than the one of its checkpoint.*another name"):
        launch.preflight(run.config.override(stop_after=None))


def test_what_says_nothing_of_the_model_may_differ(own_model):
    own, run = own_model
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"transformers_version": "0", "use_cache": False}))
    assert launch.run(run.config.override(stop_after=None)).result["resumed_from"] == 2
