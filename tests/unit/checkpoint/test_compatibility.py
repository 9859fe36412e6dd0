"""Compatibility: the settings, models, tokenizers and data that a run may resume with."""

import json
import shutil

import pytest

from tests.support.damaged_files import flip_a_bit
from tests.support.torch_runs import assert_same, config
from tutorial_lib import checkpoint, launch, trainer
from tutorial_lib.checkpoint import compatibility, manifest
from tutorial_lib.config import ConfigError


def test_every_setting_that_differs_is_named(interrupted):
    other = interrupted.config.override(
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


def test_settings_that_do_not_affect_updates_may_change(interrupted, uninterrupted):
    """Recomputing draws the same dropout masks, because it restores the first pass's random state."""
    free = {"activation_checkpointing": True, "checkpoint_every": 0, "stop_after": None}
    assert_same(launch.run(interrupted.config.override(**free)), uninterrupted)


def test_another_model_is_named_too(interrupted):
    with pytest.raises(ConfigError, match=r"model was '.*/dropout', now 'embedded/gpt2'"):
        launch.run(interrupted.config.override(model="embedded/gpt2", stop_after=None))


@pytest.fixture
def own_model(model, tmp_path):
    """Return a copy of the model that a test may change, and a run of it."""
    own = tmp_path / "model"
    shutil.copytree(model, own)
    return own, launch.run(config(tmp_path, model=str(own), stop_after=2))


def test_another_model_of_the_same_name_is_refused_before_anything_starts(own_model):
    own, run = own_model
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"n_head": 2, "embd_pdrop": 0.2}))
    with pytest.raises(
        ConfigError, match=r"a model that differs.*embd_pdrop was 0.1, now 0.2; n_head was 4, now 2\."
    ) as error:
        launch.preflight(run.config.override(stop_after=None))
    assert "or give the new run another name" in str(error.value)


def test_another_tokenizer_is_refused_before_anything_starts(own_model):
    own, run = own_model
    exchange_two_tokens(own)
    with pytest.raises(ConfigError, match=r"another tokenizer, which gives the same text different ids.*another name"):
        launch.preflight(run.config.override(stop_after=None))


def exchange_two_tokens(own):
    """Change a tokenizer so that it keeps its number of tokens, but gives texts different ids."""
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_every_change_in_a_moved_model_is_named(own_model, tmp_path):
    own, run = own_model
    moved = own.rename(tmp_path / "moved")
    exchange_two_tokens(moved)
    flip_a_bit(moved / "model.safetensors")
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"embd_pdrop": 0.2}))
    with pytest.raises(ConfigError) as error:
        launch.preflight(run.config.override(stop_after=None, model=str(moved), seed=1))
    for part in (
        "seed was 0, now 1",
        f"model was '{own}', now '{moved}' (embd_pdrop was 0.1, now 0.2, another tokenizer, which gives the "
        "same text different ids",
        "its weights are different)",
    ):
        assert part in str(error.value)


def test_a_model_in_another_directory_is_the_same_model(own_model, tmp_path):
    own, run = own_model
    own.rename(tmp_path / "moved")
    resumed = launch.run(run.config.override(stop_after=None, model=str(tmp_path / "moved")))
    assert resumed.result["resumed_from"] == 2


def test_other_weights_in_another_directory_are_another_model(own_model, tmp_path):
    own, run = own_model
    other = tmp_path / "other"
    shutil.copytree(own, other)
    flip_a_bit(other / "model.safetensors")
    given = run.config.override(stop_after=None, model=str(other))
    sampled = compatibility._SAMPLE
    assert (other / "model.safetensors").stat().st_size < 2 * sampled, "every byte is in one of the samples"
    with pytest.raises(ConfigError, match=r"model was '.*/model', now '.*/other' \(its weights are different\)"):
        launch.preflight(given)


def test_settings_that_do_not_affect_the_model_may_differ(own_model):
    own, run = own_model
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"transformers_version": "0", "use_cache": False}))
    assert launch.run(run.config.override(stop_after=None)).result["resumed_from"] == 2


@pytest.fixture
def own_data(model, tmp_path):
    """Return a data set that a test may change, and a half-finished run of it."""
    write_rows(tmp_path / "data", range(40))
    flat = {"model": model, "dataset": str(tmp_path / "data"), "evaluate": True, "stop_after": 2}
    return tmp_path / "data", launch.run(config(tmp_path, **flat))


def write_rows(directory, train, evaluation=range(8)):
    directory.mkdir(exist_ok=True)
    for split, numbers in {"train": train, "validation": evaluation}.items():
        texts = (f"This is the text of row {number}, which is about {number * 7}." for number in numbers)
        (directory / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


TRAIN, VALIDATION = "split 'train' has different tokens", "split 'validation' has different tokens"


@pytest.mark.parametrize(
    ("train", "evaluation", "split"),
    [(range(100, 140), range(8), TRAIN), ([*range(1, 40), 0], range(8), TRAIN),
     (range(40), range(50, 58), VALIDATION), (range(100, 140), range(50, 58), f"{TRAIN} and {VALIDATION}")],
)  # fmt: skip
def test_other_texts_of_the_same_number_are_refused_before_anything_starts(own_data, train, evaluation, split):
    data, run = own_data
    write_rows(data, train, evaluation)
    with pytest.raises(ConfigError, match=rf"different data: in '.*/data', {split} than when") as error:
        launch.preflight(run.config.override(stop_after=None))
    assert "Restore the old data, or give the new run another name" in str(error.value)
    assert f"export {run.config.directory} DIR`" in str(error.value)


def test_the_ranks_compare_the_data_too(own_data):
    """Under Ray, the launching process may not have the data."""
    data, run = own_data
    write_rows(data, range(100, 140))
    with pytest.raises(ConfigError, match=f"different data: .*{TRAIN}"):
        trainer.train(run.config.override(stop_after=None))


def test_evaluation_data_are_compared_if_they_are_read(own_data):
    data, run = own_data
    write_rows(data, range(40), range(50, 58))
    half = launch.run(run.config.override(stop_after=3, evaluate=False))
    assert half.result["resumed_from"] == 2
    with pytest.raises(ConfigError, match=f"different data: .*{VALIDATION}"):
        launch.preflight(run.config.override(stop_after=None))


def test_data_in_another_directory_are_the_same_data(own_data, tmp_path):
    data, run = own_data
    data.rename(tmp_path / "moved")
    moved = run.config.override(stop_after=None, dataset=str(tmp_path / "moved"))
    assert launch.run(moved).result["resumed_from"] == 2


def test_other_data_in_another_directory_are_refused(own_data, tmp_path):
    _, run = own_data
    write_rows(tmp_path / "other", range(100, 140))
    with pytest.raises(ConfigError, match=rf"dataset was '.*/data', now '.*/other' \({TRAIN}\)"):
        launch.preflight(run.config.override(stop_after=None, dataset=str(tmp_path / "other")))


def test_a_checkpoint_without_a_data_identity_still_resumes(own_data):
    """Older versions wrote checkpoints like this."""
    data, run = own_data
    write_rows(data, range(100, 140))
    edit_trainer_state(checkpoint.latest(run.directory), lambda state: state["identity"].pop("data"))
    assert launch.run(run.config.override(stop_after=None)).result["resumed_from"] == 2
    with pytest.raises(ConfigError, match="different data"):
        write_rows(data, range(40))
        launch.preflight(run.config)


def test_without_a_weights_identity_the_model_directory_must_stay_the_same(own_model, tmp_path):
    """Older versions wrote checkpoints like this."""
    own, run = own_model
    path = checkpoint.latest(run.directory)
    own.rename(tmp_path / "moved")
    edit_trainer_state(path, lambda state: state["identity"].pop("weights"))
    with pytest.raises(ConfigError, match=r"model was '.*/model', now '.*/moved'"):
        launch.preflight(run.config.override(stop_after=None, model=str(tmp_path / "moved")))


def edit_trainer_state(path, edit):
    state = json.loads((path / "trainer.json").read_text())
    edit(state)
    (path / "trainer.json").write_text(json.dumps(state))
    listed = json.loads((path / "manifest.json").read_text())
    listed["files"]["trainer.json"] = manifest.file_entry(path / "trainer.json")
    (path / "manifest.json").write_text(json.dumps(listed))


def test_a_start_that_trains_nothing_reads_no_data(own_data):
    """A reshape starts like this."""
    data, run = own_data
    shutil.rmtree(data)
    again = launch.run(run.config.override(evaluate=False, steps=None))
    assert (again.result["status"], again.result["step"]) == ("stopped", 2)
    with pytest.raises(ConfigError, match="data"):
        launch.run(run.config.override(evaluate=False, stop_after=3))


def test_more_steps_than_the_schedule_was_made_for_are_refused_with_the_reason(model, tmp_path):
    run = launch.run(config(tmp_path, model=model, steps=2, schedule="linear"))
    with pytest.raises(ConfigError, match=r"steps was 2, now 4\. The linear schedule depends on the number") as error:
        launch.run(run.config.override(steps=4))
    assert "Only a run that began with schedule='constant' may get more steps" in str(error.value)
    assert f"`python -m tutorial_lib export {run.config.directory} DIR`, then write model='DIR'" in str(error.value)
