"""Models on the meta device: they have the loaded model's parameters, and the files with their values are found."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tutorial_lib.config import Config, ConfigError, EngineConfig, ModelConfig
from tutorial_lib.embedded import MODEL_NAMES, model_directory
from tutorial_lib.engine.fsdp import weights
from tutorial_lib.models import build_model, load_model
from tutorial_lib.models.meta import check_stored_weights, locate_tensors, model_outline


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_an_outline_is_the_model_without_values(name):
    config = Config.create("cpu", engine="fsdp", model=name, freeze=("*.0.*",), activation_checkpointing=True)
    outline, model = model_outline(config.model, config.engine), build_model(config)
    described = [[(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()] for m in (outline, model)]
    assert described[0] == described[1]
    assert all(p.is_meta for p in outline.parameters())
    assert outline.get_input_embeddings().weight is outline.get_output_embeddings().weight


def located(name, **flat):
    return locate_tensors(Config.create("cpu", engine="fsdp", model=str(name), **flat).model)


def check_stored(model, engine="deepspeed"):
    check_stored_weights(ModelConfig(name=str(model)), EngineConfig(name=engine))


def test_files_of_a_model_in_one_file_and_in_several(tmp_path):
    full = located("embedded/gpt2")
    assert {tensor.path for tensor in full.values()} == {str(model_directory("embedded/gpt2") / "model.safetensors")}
    shutil.copytree(model_directory("embedded/gpt2"), tmp_path / "split")
    tensors = load_file(tmp_path / "split" / "model.safetensors")
    (tmp_path / "split" / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name].contiguous() for name in held}, tmp_path / "split" / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (tmp_path / "split" / "model.safetensors.index.json").write_text(json.dumps(index))
    found = located(tmp_path / "split")
    assert found.keys() == full.keys()
    stored = {tensor.name: tensor.path for tensor in found.values()}
    assert stored[names[1]] == str(tmp_path / "split" / "second.safetensors")
    (tmp_path / "split" / "second.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"index.json names files that are not there: second\.safetensors"):
        check_stored(tmp_path / "split")


def test_a_model_without_safetensors_is_refused(tmp_path):
    shutil.copytree(model_directory("embedded/gpt2"), tmp_path / "none")
    torch.save(load_file(tmp_path / "none" / "model.safetensors"), tmp_path / "none" / "pytorch_model.bin")
    (tmp_path / "none" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no safetensors file.*engine='deepspeed'"):
        located(tmp_path / "none")


# ------------------------------------------------------------------------------------------ weights that are not there

ENGINES = pytest.mark.parametrize("engine", ["deepspeed", "fsdp", "torch"])


def change(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


@ENGINES
def test_missing_parameters_are_refused_alike_for_every_engine(copied, engine):
    change(copied, lambda held: [held.pop(name) for name in list(held) if ".2.mlp." in name])
    with pytest.raises(ConfigError, match=r"lack 4 of its parameters: .*\.2\.mlp\.c_fc\.bias, .*, and 1 more\."):
        check_stored(copied, engine)


@ENGINES
def test_parameters_of_another_shape_are_refused_alike_for_every_engine(copied, engine):
    change(copied, lambda held: held.update({name: torch.zeros(5) for name in held if name.endswith("ln_f.bias")}))
    with pytest.raises(
        ConfigError, match=r"do not fit its config\.json: they hold .*ln_f\.bias as \[5\] in place of \[96\]"
    ):
        check_stored(copied, engine)


@ENGINES
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_quantized_weights_without_their_configuration_are_refused(copied, engine, dtype):
    change(copied, lambda held: held.update({name: held[name].to(dtype) for name in held if "c_proj.weight" in name}))
    with pytest.raises(ConfigError, match=r"model\.safetensors stores .*c_proj\.weight as integers.*it was quantized"):
        check_stored(copied, engine)


def test_a_model_that_is_loaded_alone_refuses_what_its_files_lack(copied):
    change(copied, lambda held: [held.pop(name) for name in list(held) if name.endswith("ln_f.bias")])
    with pytest.raises(ConfigError, match=r"lack 1 of its parameters: transformer\.ln_f\.bias"):
        load_model(str(copied))
    change(copied, lambda held: held.update({"transformer.ln_f.bias": torch.zeros(5)}))
    with pytest.raises(ConfigError, match=r"transformer\.ln_f\.bias as \[5\] in place of \[96\]"):
        load_model(str(copied))


@ENGINES
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda full: b"version https://git-lfs.github.com/spec/v1\nsize 9\n", r"git-lfs pointer of \d+ bytes"),
        (lambda full: full[: len(full) // 2], r"damaged or cut short \(.*\)\. Copy or download it again"),
        (lambda full: b"", r"damaged or cut short"),
    ],
)  # fmt: skip
def test_pointers_and_cut_files_are_named(copied, engine, content, message):
    path = copied / "model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    for load in (lambda: check_stored(copied, engine),
                 lambda: load_model(str(copied))):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"model/model\.safetensors is .*{message}"):
            load()


@ENGINES
def test_a_directory_without_weights_is_refused_alike_for_every_engine(copied, engine):
    (copied / "model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"does not hold a usable model: it has no weights: neither model\.safetensors"
    ):
        check_stored(copied, engine)


@pytest.mark.parametrize("content", ["{}", "[]", "version https://git-lfs", '{"weight_map": []}'])
def test_a_damaged_index_is_named(copied, content):
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json is damaged: .*Copy or download it again"):
        check_stored(copied, "torch")


def test_an_index_of_files_that_would_not_be_read_may_name_absent_ones(copied):
    """The hub often has a model in both formats, and ``--exclude "*.bin"`` downloads the second one's index as well."""
    (copied / "pytorch_model.bin.index.json").write_text('{"weight_map": {"weight": "pytorch_model-1-of-2.bin"}}')
    check_stored(copied, "torch")
    load_model(str(copied))


@ENGINES
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantized .*Write the name of the original model"),
        ({"attn_pdrop": 1.5}, r"can be built from the config\.json of this gpt2 model: ValueError: dropout"),
        ({"n_head": 7}, r"can be built from the config\.json of this gpt2 model: ValueError: `embed_dim` must be"),
        ({"activation_function": "foo"}, r"can be built from the config\.json of this gpt2 model: KeyError: 'foo'"),
        ({"n_layer": "2"}, r"does not hold a usable model: Validation error for field 'n_layer': .*got str"),
    ],
)  # fmt: skip
def test_a_configuration_that_makes_no_model_is_refused(copied, engine, settings, message):
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ConfigError, match=message):
        check_stored(copied, engine)


def test_an_adapter_beside_its_base_model_is_not_dropped(copied):
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds an adapter .*merge_and_unload"):
        check_stored(copied, "torch")


def test_a_cut_torch_file_is_named(copied):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    check_stored(copied, "torch")
    path = copied / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is damaged or cut short"):
        check_stored(copied, "torch")


# ------------------------------------------------------------------------------------------- pickles that may hold code


class RunsWhenUnpickled:
    def __reduce__(self):
        return (pytest.fail, ("code from a file of weights was run",))


def save_old(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_plain(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.fixture
def pickled(copied):
    """Return a model's directory without safetensors, its parameters, and the path of their file."""
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    return copied, tensors, copied / "pytorch_model.bin"


@pytest.mark.parametrize("save", [torch.save, save_old, save_plain])
def test_a_pickle_that_may_run_code_is_refused_unread(pickled, save):
    directory, tensors, path = pickled
    save(tensors | {"more": RunsWhenUnpickled()}, path)
    for load in (lambda: check_stored(directory, "torch"),
                 lambda: load_model(str(directory))):  # fmt: skip
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle of more than tensors.*convert it once"):
            load()


@pytest.mark.parametrize("save", [torch.save, save_old, save_plain])
def test_the_command_in_the_refusal_converts_a_pickle(pickled, save):
    directory, tensors, path = pickled
    save({"state_dict": tensors, "arguments": argparse.Namespace(steps=1)}, path)
    with pytest.raises(ConfigError) as refused:
        check_stored(directory, "torch")
    exec(str(refused.value).partition("<<'END'\n")[2].removesuffix("END"), {})
    check_stored(directory, "torch")
    assert all(tensor.equal(tensors[name]) for name, tensor in load_file(directory / "model.safetensors").items())


@pytest.mark.parametrize("save", [torch.save, save_old])
def test_a_pickle_of_tensors_alone_is_checked_and_read(pickled, save):
    directory, tensors, path = pickled
    save(tensors, path)
    check_stored(directory, "torch")
    assert load_model(str(directory)).lm_head.weight.equal(load_model("embedded/gpt2").lm_head.weight)
    save({name: tensor for name, tensor in tensors.items() if not name.endswith("ln_f.bias")}, path)
    with pytest.raises(ConfigError, match=r"lack 1 of its parameters: transformer\.ln_f\.bias"):
        check_stored(directory, "torch")
    save(list(tensors), path)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin holds a list, not tensors by parameter name"):
        check_stored(directory, "torch")


@pytest.mark.parametrize("content", [b"", b"hello world"])
def test_a_file_that_is_not_a_pickle_is_named(pickled, content):
    directory, _, path = pickled
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is damaged, or not a weight file .*Copy or download"):
        check_stored(directory, "torch")


def save_random(family, directory, **sizes):
    sizes |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=64, num_key_value_heads=2, **sizes)
    with torch.random.fork_rng():
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def test_names_that_transformers_renames_are_found(tmp_path):
    """GPT-NeoX is stored with embed_out, and its output layer is called lm_head."""
    save_random("gpt_neox", tmp_path / "model")
    assert located(tmp_path / "model")["lm_head.weight"].name == "embed_out.weight"
    config = Config.create("cpu", engine="fsdp", model=str(tmp_path / "model"))
    filled = model_outline(config.model, config.engine)
    weights.fill_model(filled, config.model, seed=config.run.seed, device=torch.device("cpu"), host=False)
    loaded = dict(load_model(config.model.name).named_parameters())
    assert all(parameter.equal(loaded[name]) for name, parameter in filled.named_parameters())


def test_tensors_that_transformers_converts_are_for_other_engines(tmp_path):
    save_random("mixtral", tmp_path / "model", num_local_experts=2, num_experts_per_tok=1)
    check_stored(tmp_path / "model", "torch")
    with pytest.raises(ConfigError, match=r"reads tensors as they are stored, .*experts\.\d\..*engine='deepspeed'"):
        check_stored(tmp_path / "model", "fsdp")


# ------------------------------------------------------------------------------------- weights that would be dropped


def qwen2_layer(number):
    return f"model.layers.{number}.self_attn"


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp", "torch"])
@pytest.mark.parametrize(
    "name",
    [
        f"{qwen2_layer(0)}.o_proj.bias", f"{qwen2_layer(9)}.o_proj.weight", f"{qwen2_layer(0)}.q_proj.lora_A.weight",
        "model.encoder.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight",
    ],
)  # fmt: skip
def test_tensors_that_a_model_would_drop_are_refused(tmp_path, engine, name):
    """Without a bias that config.json turns off, a further layer, an adapter or an encoder, it is another model."""
    directory = shutil.copytree(model_directory("embedded/qwen2"), tmp_path / "model")
    change(directory, lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(ConfigError, match=rf"hold 1 tensors.*{name}.*would be dropped.*Correct config\.json"):
        check_stored(directory, engine)
    with pytest.raises(ConfigError, match="would be dropped"):
        load_model(str(directory))


@pytest.mark.parametrize(
    "name",
    ["score.weight", "score.0.weight", "transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias",
     "h.0.attn.masked_bias"],
)  # fmt: skip
def test_stored_heads_of_other_tasks_and_old_buffers_are_ignored(copied, name):
    change(copied, lambda tensors: tensors.update({name: torch.ones(4)}))
    check_stored(copied, "torch")
    load_model(str(copied))
