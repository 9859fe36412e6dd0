"""Loading: one path to every model, and errors that say what to write instead."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer

from tutorial_lib.config import ConfigError
from tutorial_lib.embedded import MODEL_NAMES, model_directory
from tutorial_lib.models.loading import (
    fetch,
    freeze_parameters,
    hub_reachable,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
)

families = pytest.mark.parametrize("name", MODEL_NAMES)


# --------------------------------------------------------------------------------------------------------- tokenizers


@families
def test_tokenizers_pad_on_the_right(name):
    tokenizer = load_tokenizer(name)
    batch = tokenizer(["one", "a longer text"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist(), reverse=True)
    assert batch["attention_mask"][0, -1] == 0
    assert batch["input_ids"][0, -1] == tokenizer.pad_token_id


def test_gpt2_gets_the_pad_token_it_lacks():
    assert AutoTokenizer.from_pretrained(model_directory("embedded/gpt2")).pad_token is None
    assert load_tokenizer("embedded/gpt2").pad_token == "<|endoftext|>"


def test_blooms_own_tokenizer_pads_on_the_left():
    assert AutoTokenizer.from_pretrained(model_directory("embedded/bloom")).padding_side == "left"
    assert load_tokenizer("embedded/bloom").pad_token == "<pad>"


# -------------------------------------------------------------------------------------------------------------- names


def test_a_directory_is_loaded_like_an_embedded_name():
    directory = str(model_directory("embedded/qwen2"))
    assert resolve_model("embedded/qwen2") == resolve_model(directory) == directory
    assert resolve_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    left, right = load_model("embedded/qwen2"), load_model(directory)
    assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("load", [load_model, load_config, load_tokenizer])
def test_unknown_name_without_a_hub(load):
    with pytest.raises(ConfigError) as error:
        load("no-such/model")
    message = str(error.value)
    assert "'no-such/model' is neither a directory nor embedded" in message
    assert "the hub could not be reached" in message
    assert "embedded/gpt2, embedded/qwen2, embedded/bloom" in message


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere"])
def test_a_missing_path(name):
    with pytest.raises(ConfigError, match="neither a local directory nor a hub name"):
        load_model(name)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="does not hold a usable model"):
        load_model(str(tmp_path))


def test_misspelt_embedded_name():
    with pytest.raises(ConfigError, match=r"no embedded model 'embedded/gtp2'\. Write one of: embedded/gpt2"):
        load_tokenizer("embedded/gtp2")


@pytest.mark.parametrize(
    ("raised", "passes"),
    [
        (OSError("it has no file named model.safetensors"), False),
        (FileNotFoundError(2, "No such file or directory", str(model_directory("embedded/gpt2") / "x.json")), False),
        (ValueError("Unrecognized model. Should have a `model_type` key"), False),
        (PermissionError(13, "Permission denied", "/elsewhere/compiled/op"), True),
        (OSError(28, "No space left on device"), True),
        (RuntimeError("out of memory"), True),
    ],
)
def test_errors_name_the_directory_only_for_missing_and_unreadable_files(raised, passes):
    def load(target, *, local_files_only):
        raise raised

    with pytest.raises(type(raised) if passes else ConfigError) as error:
        fetch(load, "model", "embedded/gpt2")
    assert (error.value is raised) == passes


def test_invalid_deepspeed_settings_are_not_reported_as_a_broken_model():
    from deepspeed.ops.op_builder.cpu.no_impl import NotImplementedBuilder

    with pytest.raises(ValueError, match="had not been implemented") as error:
        fetch(lambda target, local_files_only: NotImplementedBuilder().load(), "model", "embedded/gpt2")
    assert not isinstance(error.value, ConfigError)


class Refusing(BaseHTTPRequestHandler):
    """A hub that answers, but knows no model."""

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def refusing_hub():
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_refusing_hub_is_named(refusing_hub, tmp_path):
    code = """
from tutorial_lib.config import ConfigError
from tutorial_lib.models import load_model
try:
    load_model("no-such/model")
except ConfigError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    environment |= {"HF_ENDPOINT": refusing_hub, "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'no-such/model' is neither a directory nor embedded, and the hub did not provide it" in done.stdout
    assert "embedded/gpt2" in done.stdout


def test_an_unreachable_hub_is_asked_only_once(monkeypatch):
    """By default, transformers retries for 23 seconds."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub_reachable.cache_clear()
    started = time.perf_counter()
    try:
        with pytest.raises(ConfigError, match="the hub could not be reached"):
            load_tokenizer("no-such/model")
    finally:
        hub_reachable.cache_clear()
    assert time.perf_counter() - started < 10


def test_code_that_a_model_ships_runs_only_if_asked_for(tmp_path):
    model, ran = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "ours", "auto_map": {"AutoConfig": "configuration_ours.Ours"}})
    )
    (model / "configuration_ours.py").write_text(
        f"from pathlib import Path\nfrom transformers import PretrainedConfig\nPath({str(ran)!r}).touch()\n"
        "class Ours(PretrainedConfig):\n    model_type = 'ours'\n"
    )
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        load_config(str(model))
    assert not ran.exists()
    assert load_config(str(model), trust_remote_code=True).model_type == "ours"
    assert ran.exists()


# ----------------------------------------------------------------------------------------------------- random weights


@families
def test_random_weights_depend_only_on_the_seed(name):
    before = torch.random.get_rng_state()
    models = [load_model(name, random_init=True, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's generator was used"
    same, again, other = (model.get_input_embeddings().weight for model in models)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert same.std().item() == pytest.approx(models[0].config.initializer_range, rel=0.02)
    assert same is models[0].get_output_embeddings().weight
    loss = models[0](input_ids=torch.arange(100)[None], labels=torch.arange(100)[None]).loss.item()
    assert loss == pytest.approx(torch.tensor(2048.0).log().item(), abs=0.3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@families
def test_random_weights_do_not_depend_on_the_device(name):
    expected = load_model(name, random_init=True, seed=7)
    with torch.device("cuda"):
        model = load_model(name, random_init=True, seed=7)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert all(torch.equal(p.cpu(), q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


def test_gpt2_small_has_no_weights_but_dimensions():
    with pytest.raises(ConfigError, match=r"configuration without weights\. Write random_init=True"):
        load_model("embedded/gpt2-small")
    assert load_model("embedded/gpt2-small", random_init=True).num_parameters() == 124_439_808


STAGE_3 = """
import sys, torch, deepspeed
from transformers.integrations import HfDeepSpeedConfig
from tutorial_lib.embedded import MODEL_NAMES
from tutorial_lib.models.loading import load_model

options = [{}, {"random_init": True, "seed": 5}]
plain = {(n, i): load_model(n, **o) for n in MODEL_NAMES for i, o in enumerate(options)}
deepspeed.init_distributed("gloo", dist_init_required=True, verbose=False)
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
keep = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})
ids = torch.arange(30)[None]
mask = torch.block_diag(torch.ones(12, 12), torch.ones(18, 18)).tril().bool()[None, None]
position_ids = torch.cat([torch.arange(12), torch.arange(18)])[None]
for (name, i), expected in plain.items():
    model = load_model(name, **options[i], freeze=("*.bias",))
    parameters = list(model.parameters())
    assert all(p.numel() == 0 and hasattr(p, "ds_id") for p in parameters), "a parameter is not partitioned"
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith(".bias")
    }
    with deepspeed.zero.GatheredParameters(parameters), torch.no_grad():
        for (n, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q), (name, i, n)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
        assert torch.equal(model.eval()(**batch).logits, expected.eval()(**batch).logits), name
    print("ok", name, i)
"""


def test_models_partitioned_at_construction_are_the_same():
    """At stage 3, every parameter of pretrained and random models is partitioned, and no weight differs."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", STAGE_3], env={**os.environ, **alone}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^ok \S+ \d", done.stdout, re.MULTILINE) == [f"ok {n} {i}" for n in MODEL_NAMES for i in (0, 1)]


# ------------------------------------------------------------------------------------------------- freezing


def test_freezing_by_pattern():
    model = load_model("embedded/qwen2", freeze=("model.layers.0.*", "*.mlp.up_proj.weight"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if name.startswith("model.layers.0.") or "mlp.up_proj" in name
    }
    assert len(frozen) == 12 + 3


@pytest.mark.parametrize("pattern", ["lm_head.weight", "transformer.wte.weight"])
def test_a_tied_weight_is_frozen_under_both_names(pattern):
    model = load_model("embedded/gpt2")
    assert set(freeze_parameters(model, [pattern])) == {"lm_head.weight", "transformer.wte.weight"}
    assert not model.get_input_embeddings().weight.requires_grad


def test_a_pattern_that_matches_nothing_names_near_ones():
    with pytest.raises(ConfigError, match=r"no parameter matches 'transformer\.wte'.*transformer\.wte\.weight"):
        load_model("embedded/gpt2", freeze=("transformer.wte",))
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        load_model("embedded/gpt2", freeze=("*",))
