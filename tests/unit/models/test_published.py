"""Published models, which have the published dimensions and a tokenizer that fits, but no weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutorial_lib.cli import main
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.engine.expected_states import expected_states, parameter_sizes
from tutorial_lib.launch import preflight
from tutorial_lib.models import load_config, load_model, load_tokenizer
from tutorial_lib.models.dimensions import from_config
from tutorial_lib.models.published import PUBLISHED, published_directory

VOCABULARIES = {"bloom-560m": 250_880, "gpt2": 50_257, "gpt2-medium": 50_257, "qwen2.5-0.5b": 151_936}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_as_many_parameters_as_the_published_one(name):
    published = PUBLISHED[name].num_parameters
    config = Config.create("cpu", model=f"published/{name}", random_init=True)
    assert sum(parameter_sizes(config.model, config.engine).trained) == published
    assert from_config(load_config(f"published/{name}")).num_params == published


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_gets_its_familys_tokenizer_and_no_id_beyond_its_vocabulary(name):
    config, tokenizer = load_config(f"published/{name}"), load_tokenizer(f"published/{name}")
    assert config.vocab_size == VOCABULARIES[name]
    assert max(tokenizer.get_vocab().values()) < config.vocab_size
    assert config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.get_vocab() == load_tokenizer(PUBLISHED[name].family).get_vocab()


def test_a_published_models_directory_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TUTORIAL_LIB_CACHE", str(tmp_path))
    directory = published_directory("published/gpt2")
    written = (directory / "config.json").stat().st_mtime_ns
    assert published_directory("gpt2") == directory
    assert (directory / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in directory.parent.iterdir()] == ["gpt2"]


def test_an_unknown_name_is_refused_with_a_near_one():
    with pytest.raises(ConfigError, match=r"for a model 'gpt3'\. Did you mean 'gpt2'"):
        load_config("published/gpt3")


def test_without_random_weights_it_is_refused_before_a_process_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"published/gpt2 is a configuration without weights\. Write random"):
        preflight(Config.create("cpu", model="published/gpt2", storage=str(tmp_path)))
    with pytest.raises(ConfigError, match="without weights"):
        load_model("published/gpt2")


def test_states_that_do_not_fit_are_refused_with_the_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr("tutorial_lib.launch.checks.available_memory_gb", lambda: 14.0)
    config = Config.create(
        "cpu", model="published/bloom-560m", random_init=True, dp=1, zero_stage=2, offload="optimizer",
        seq_length=16, storage=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"needs 11\.6 GB of memory, and 14\.0 GB are free here: 11\.2 GB for model"):
        preflight(config)
    assert preflight(config.override(precision="bf16", offload="none", model="published/gpt2"))


def test_the_workshops_page_states_the_bytes_of_bloom_560m_as_the_formula_gives_them():
    config = Config.create(
        "cpu", model="published/bloom-560m", random_init=True, dp=1, zero_stage=2, offload="optimizer",
        precision="bf16",
    )  # fmt: skip
    (states,) = expected_states(config, parameter_sizes(config.model, config.engine)) or ()
    page = Path(__file__).parents[3] / "docs" / "workshop.md"
    assert f"gives, {states.total / 2**20:,.2f} MiB of model states" in page.read_text(encoding="utf-8")


def test_the_command_line_accepts_model_config_without_model(capsys):
    assert main(["plan", "--random-init", "--model-config", "gpt2", "--gpus", "1", "--gpu-memory", "16"]) == 0
    assert "dimensions: published/gpt2" in capsys.readouterr().out
    for command in (["train"], ["bench", "offload"]):
        assert main([*command, "--model", "gpt2", "--model-config", "gpt2"]) == 2
        assert "--model gpt2 and --model-config gpt2 both name the model" in capsys.readouterr().err
