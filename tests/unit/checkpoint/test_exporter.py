"""Export: a Hugging Face directory, written one parameter at a time."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.support.torch_runs import config, weights
from tutorial_lib import checkpoint, launch
from tutorial_lib.config import ConfigError

ROOT = Path(__file__).parents[3]


def test_a_large_export_has_several_files_and_loads_the_same(uninterrupted, tmp_path):
    from transformers import AutoModelForCausalLM

    path = checkpoint.latest(uninterrupted.directory)
    one, several = (checkpoint.export(path, tmp_path / size, size) for size in ("50GB", "60KB"))
    assert [p.name for p in one.glob("*.safetensors*")] == ["model.safetensors"]
    files = sorted(several.glob("model-*.safetensors"))
    assert len(files) > 2
    largest = max(tensor.nbytes for tensor in weights(uninterrupted).values())
    assert all(file.stat().st_size < max(60_000, largest) + 10_000 for file in files)
    assert json.loads((several / "model.safetensors.index.json").read_text())["weight_map"].keys() == {
        name for name in weights(uninterrupted) if name != "lm_head.weight"
    }
    inputs = torch.arange(24).view(2, 12)
    logits = []
    for export in (one, several):
        model, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
        assert not any(info.values()), info
        assert all(parameter.equal(weights(uninterrupted)[name]) for name, parameter in model.named_parameters())
        with torch.no_grad():
            logits.append(model.eval()(inputs).logits)
    assert logits[0].equal(logits[1])


def test_an_export_that_is_interrupted_leaves_nothing_that_looks_complete(uninterrupted, tmp_path, monkeypatch):
    path, target = checkpoint.latest(uninterrupted.directory), tmp_path / "exported"

    def killed(*given, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", killed)  # copies the tokenizer and other files, after the weights
        with pytest.raises(KeyboardInterrupt):
            checkpoint.export(path, target)
    assert [p.name for p in tmp_path.iterdir()] == [".exported.partial"]
    checkpoint.export(path, target)
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]


def test_an_export_that_fills_the_disk_says_where_and_frees_its_space(uninterrupted, tmp_path, monkeypatch):
    def fail(*given, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does, without the file's name

    monkeypatch.setattr(shutil, "copytree", fail)
    target = tmp_path / "exported"
    with pytest.raises(checkpoint.CheckpointError, match=rf"The export to {target} failed: .* No space left on device"):
        checkpoint.export(checkpoint.latest(uninterrupted.directory), target)
    assert list(tmp_path.iterdir()) == []


def test_an_export_through_a_symlink_lands_in_its_directory(uninterrupted, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    checkpoint.export(checkpoint.latest(uninterrupted.directory), tmp_path / "link")
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]


@pytest.mark.parametrize(
    ("target", "message"),
    [(Path("."), r"\. is the current directory"), (Path("volume"), "volume is a mount point")],
    ids=["current", "mount"],
)
def test_a_directory_that_cannot_be_replaced_is_refused(uninterrupted, tmp_path, monkeypatch, target, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "volume")
    target.mkdir(exist_ok=True)
    before = list(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"{message}, which an export cannot replace. Name a new directory in it"):
        checkpoint.export(checkpoint.latest(uninterrupted.directory), target)
    assert list(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", ["large", "-5GB", "0GB", "infGB"])
def test_an_invalid_shard_size_is_refused(uninterrupted, tmp_path, size):
    with pytest.raises(ConfigError, match=rf"max_shard_size='{size}' is not a size above 0: write one such as '5GB'"):
        checkpoint.export(checkpoint.latest(uninterrupted.directory), tmp_path / "exported", size)
    assert not list(tmp_path.iterdir())


_PEAKS = """
import json, sys, threading
from pathlib import Path
from tutorial_lib import checkpoint
from tutorial_lib.checkpoint import exporter

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024

def rise(source, target):
    done, seen = threading.Event(), [anonymous()]
    def watch():
        while not done.wait(0.001):
            seen.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    checkpoint.export(Path(source), Path(target))
    done.set()
    thread.join()
    return max(seen) - seen[0]

small, large, target = sys.argv[1:]
rise(small, target + "-small")  # imports and library caches
peaks = [rise(large, target + "-streamed")]
def open_all(path):
    full = checkpoint.open_full(path)
    tensors = {name: full.parameter(name).clone() for name in full.names}
    full.parameter = tensors.__getitem__
    return full

exporter.open_full = open_all
print(json.dumps([*peaks, rise(large, target + "-at-once")]))
"""


def test_an_export_holds_a_parameter_at_a_time(uninterrupted, model, tmp_path):
    """The peak is measured in a new process. As a control, reading everything first must raise it."""
    larger = tmp_path / "larger"
    shutil.copytree(model, larger)
    (larger / "model.safetensors").unlink()
    path = larger / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_embd": 128, "n_layer": 32}))
    run = launch.run(config(tmp_path, name="larger", model=str(larger), random_init=True, steps=1, global_batch=1))
    sizes = [tensor.nbytes for name, tensor in weights(run).items() if name != "lm_head.weight"]
    given = [str(checkpoint.latest(r.directory)) for r in (uninterrupted, run)]
    shown = subprocess.run(
        [sys.executable, "-c", _PEAKS, *given, str(tmp_path / "exported")], check=True, capture_output=True, cwd=ROOT
    )
    streamed, at_once = json.loads(shown.stdout.splitlines()[-1])
    assert sum(sizes) > 20 * max(sizes)
    assert streamed < 2 * max(sizes) + 4e6, f"{streamed} for parameters of at most {max(sizes)} bytes"
    assert at_once > 0.9 * sum(sizes)


@pytest.mark.parametrize("use_cache", [True, False])
def test_changes_made_only_for_training_are_not_exported(model, tmp_path, monkeypatch, use_cache):
    """Padding side, pad token, generation settings and cache setting equal those of the user's original model."""
    own = tmp_path / "own"
    shutil.copytree(model, own)
    generation = {"eos_token_id": [255, 5], "temperature": 0.6, "do_sample": False}  # transformers would not save these
    (own / "generation_config.json").write_text(json.dumps(generation))
    for file, changes in {
        "config.json": {"use_cache": use_cache},
        "tokenizer_config.json": {"padding_side": "left"},
    }.items():
        (own / file).write_text(json.dumps(json.loads((own / file).read_text()) | changes))
    run = launch.run(config(tmp_path, model=str(own), steps=1))
    shutil.rmtree(own)
    monkeypatch.setenv("HOME", str(tmp_path))
    target = checkpoint.export(checkpoint.latest(run.directory), Path("~/exported"))
    assert target == tmp_path / "exported" and target.is_dir()
    assert json.loads((target / "generation_config.json").read_text()) == generation
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", None)
    settings = json.loads((target / "config.json").read_text())
    assert (settings["use_cache"], settings["dtype"]) == (use_cache, "float32")


def test_a_model_without_generation_settings_gets_its_configurations(uninterrupted, tmp_path):
    target = checkpoint.export(checkpoint.latest(uninterrupted.directory), tmp_path / "exported")
    settings = json.loads((target / "generation_config.json").read_text())
    assert settings["eos_token_id"] == json.loads((target / "config.json").read_text())["eos_token_id"]
