"""Model directories whose files other than the weights are damaged, git-lfs pointers, or of the wrong kind."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tutorial_lib.config import ConfigError
from tutorial_lib.embedded import MODEL_NAMES, model_directory
from tutorial_lib.models import load_config, load_model, load_tokenizer
from tutorial_lib.models.side_files import check_side_files, load_side_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
LOADERS = {
    "config.json": load_config,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "special_tokens_map.json": load_tokenizer,
    "added_tokens.json": load_tokenizer,
    "generation_config.json": check_side_files,
}


@pytest.mark.parametrize("file", LOADERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a JSON list, but must hold an object"),
        (b"null", "holds a JSON NoneType, but must hold an object"),
        (b'{"a": {"b": 1, "b": 2}}', "is not valid JSON: 'b' is given twice in one object, and only the last"),
        (b"{", "is not valid JSON: .*line 1.*Copy or download it again"),
        (b'{"a": "\xe9"}', "is not valid JSON: .*byte 0xe9.*Copy or download it again"),
        (POINTER.encode(), "is a git-lfs pointer of \\d+ bytes.*Run `git lfs pull` in .*/model, or download the file"),
        (None, "is a directory, but must be a file"),
    ],
)
def test_a_file_that_is_not_a_json_object_is_named(copied, file, content, message):
    path = copied / file
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))} {message}"):
        LOADERS[file](str(copied))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_key_given_twice_with_the_same_value_is_accepted(copied, file):
    path = copied / file
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | {"eos_token_id": 0})[:-1] + ', "eos_token_id": 0}')
    LOADERS[file](str(copied))


@pytest.mark.parametrize("file", ["chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model"])
def test_a_pointer_in_place_of_what_a_tokenizer_reads_is_named(copied, file):
    (copied / file).write_text(POINTER)
    if file != "chat_template.jinja":
        load_tokenizer(str(copied))  # reads tokenizer.json instead
        (copied / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=rf"model/{file} is a git-lfs pointer"):
        load_tokenizer(str(copied))


@pytest.mark.parametrize("name", ["embedded/gpt2", "embedded/qwen2"])
def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path, name):
    directory = shutil.copytree(model_directory(name), tmp_path / "model")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokens except .*'<\|endoftext\|>'.*Add the model's tokenizer\.json"):
        load_tokenizer(str(directory))


def test_a_model_without_tokenizer_files_is_refused_with_what_to_do(copied):
    for file in copied.glob("*token*"):
        file.unlink()
    with pytest.raises(
        ConfigError, match=r"a model without a tokenizer\. Copy the .* or save it there with tokenizer\."
    ):
        load_tokenizer(str(copied))


def test_a_tokenizer_without_eos_is_refused_with_what_to_do(copied):
    (copied / "config.json").write_text('{"model_type": "stablelm"}')
    (copied / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r'no EOS token .*its tokenizer_config\.json, such as "eos_token"'):
        load_tokenizer(str(copied))
    (copied / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert load_tokenizer(str(copied)).eos_token == "<|endoftext|>"


def test_generation_settings_that_the_library_refuses_are_refused_before(copied):
    (copied / "generation_config.json").write_text('{"cache_implementation": "papyrus"}')
    for load in (check_side_files, load_model):
        with pytest.raises(ConfigError, match=r"generation_config\.json is not a valid generation config: .*papyrus"):
            load(str(copied))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_saved_tokenizer_has_the_settings_of_the_original(name, tmp_path):
    load_side_files(name).save(tmp_path, load_config(name))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        original = model_directory(name) / file
        assert json.loads((tmp_path / file).read_text()) == json.loads(original.read_text())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float13", "torch.float32", "Tensor", 32, ["float32"]])
def test_an_unknown_dtype_is_named(copied, key, value):
    change_config(copied, {key: value})
    said = re.escape(f"config.json: {key} is {json.dumps(value)}, which is not a PyTorch dtype")
    with pytest.raises(ConfigError, match=f'{said}.*Write one, such as "float32"'):
        load_config(str(copied))


def test_dtypes_of_a_models_parts_are_checked_too(copied):
    change_config(copied, {"text_config": {"dtype": "float13"}})
    with pytest.raises(ConfigError, match=r'config\.json: text_config\.dtype is "float13"'):
        load_config(str(copied))
    change_config(copied, {"text_config": None, "dtype": {"text_config": "float13"}})
    with pytest.raises(ConfigError, match=r'config\.json: dtype\.text_config is "float13"'):
        load_config(str(copied))


@pytest.mark.parametrize("value", ["bfloat16", None])
def test_valid_dtypes_are_accepted(copied, value):
    change_config(copied, {"dtype": value})
    load_config(str(copied))


def change_config(directory, settings):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
