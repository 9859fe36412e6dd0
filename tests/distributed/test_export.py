"""Contents of a checkpoint, and its export to a Hugging Face directory."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.cases.equivalence import among_runs
from tutorial_lib import checkpoint
from tutorial_lib.checkpoint.manifest import MANIFEST
from tutorial_lib.config import ConfigError
from tutorial_lib.models import load_model

FP32 = [
    (1, "gpt2.reference"),
    *((2, f"gpt2.{stage}.2") for stage in ("zero0", "zero1", "zero2", "zero3", "zero2-optimizer", "zero3-all")),
    *((2, f"frozen.{stage}.2") for stage in ("zero0", "zero1", "zero2", "zero3")),
    (2, "untied.zero3.2"),
    (2, "bloom.zero1.2"),
    (4, "uneven.zero3.4"),
    *((2, f"qwen2.1x2-{stage}.2") for stage in ("zero0", "zero3", "zero2-optimizer", "zero3-all")),
    *((2, f"bloom.1x2-{stage}.2") for stage in ("zero1", "zero3")),
    *((4, f"{case}.2x2-zero{stage}.4") for case in ("qwen2", "bloom") for stage in range(4)),
    *((4, f"{case}.1x4-zero{stage}.4") for case in ("qwen2", "bloom") for stage in (2, 3)),
    *((4, f"untied.2x2-zero{stage}.4") for stage in (0, 1, 3)),
    *((2, name) for name in ("gpt2.fsdp-full.2", "gpt2.fsdp-none.2", "frozen.fsdp-tp2.2", "untied.fsdp-tp2.2")),
    *((4, name) for name in ("gpt2.fsdp-tp2.4", "bloom.fsdp-tp4.4", "untied.fsdp-hybrid.4", "odd.fsdp-tp2.4")),
    *((2, f"scaled.{name}.2") for name in ("fsdp-full", "fsdp-none", "zero3")),
    (4, "scaled.fsdp-hybrid.4"),
    *((2, f"frozen-split.1x2-zero{stage}.2") for stage in (0, 3)),
    *((4, f"frozen-split.2x2-zero{stage}.4") for stage in (1, 3)),
]
BF16 = [(2, f"gpt2.{stage}-bf16.2") for stage in ("zero0", "zero1", "zero2", "zero3")]


def exported(run, tmp_path):
    return checkpoint.export(checkpoint.latest(run.directory), tmp_path / "exported")


@pytest.mark.parametrize(("ranks", "name"), among_runs(FP32))
def test_an_export_gives_the_logits_of_the_engine(observed, tmp_path, ranks, name):
    run = observed(ranks, name)
    target = exported(run, tmp_path)
    # Packed rows need the document masks that load_model teaches BLOOM. Everything else needs only transformers.
    load = load_model if run.config.data.batching == "packed" else AutoModelForCausalLM.from_pretrained
    model = load(str(target))
    parameters = dict(model.named_parameters())
    assert parameters.keys() == run.parameters.keys()
    assert all(parameters[name].equal(expected) for name, expected in run.parameters.items())
    with torch.no_grad():
        logits = model.eval()(**run.inputs, use_cache=False).logits
    rounding = 3e-6 if run.config.parallel.tp > 1 else 1e-6  # split layers sum in a different order
    assert (logits - run.logits).abs().max() <= rounding * run.logits.abs().max()
    assert AutoTokenizer.from_pretrained(target).eos_token is not None


@pytest.mark.parametrize(("ranks", "name"), among_runs(BF16))
def test_an_export_holds_the_fp32_master_weights(observed, tmp_path, ranks, name):
    run = observed(ranks, name)
    model = AutoModelForCausalLM.from_pretrained(exported(run, tmp_path), dtype=torch.float32)
    masters = dict(model.named_parameters())
    for name, in_16_bits in run.parameters.items():
        assert masters[name].bfloat16().float().equal(in_16_bits)
        assert not masters[name].equal(in_16_bits), f"{name} was rounded to bf16"
    with torch.no_grad():
        logits = model.bfloat16().eval()(**run.inputs, use_cache=False).logits
    assert logits.equal(run.logits)


def test_an_export_of_fsdp_in_bf16_holds_the_fp32_weights_too(observed, tmp_path):
    """FSDP2 shards and updates fp32 parameters; only the gathered copies are bf16."""
    run = observed(2, "gpt2.fsdp-full-bf16.2")
    model = AutoModelForCausalLM.from_pretrained(exported(run, tmp_path), dtype=torch.float32)
    parameters = dict(model.named_parameters())
    assert all(parameters[name].equal(expected) for name, expected in run.parameters.items())
    assert not all(weight.bfloat16().float().equal(weight) for weight in parameters.values())
    with torch.no_grad():
        logits = model.bfloat16().eval()(**run.inputs, use_cache=False).logits
    assert logits.equal(run.logits)


@pytest.mark.parametrize(
    ("ranks", "name"),
    among_runs([(2, "gpt2.fsdp-full.2"), (2, "gpt2.fsdp-none.2"), (4, "gpt2.fsdp-tp2.4"), (4, "gpt2.fsdp-hybrid.4")]),
)
def test_each_rank_of_fsdp_writes_only_its_own_files(observed, ranks, name):
    run = observed(ranks, name)
    for rank, files in enumerate(run.files_by_rank):
        assert {f for f in files if f.endswith(".distcp")} <= {f"engine/__{rank}_0.distcp"}
        assert f"rank-{rank:03d}.pt" in files
        assert ("engine/.metadata.tmp" in files) == (rank == 0)
    path = checkpoint.latest(run.directory)
    sizes = [entry["bytes"] for name, entry in json.loads((path / MANIFEST).read_text())["files"].items()
             if name.endswith(".distcp")]  # fmt: skip
    # The files hold each element of the parameters and of two moments once, in fp32. DCP adds some bytes per tensor.
    states = 12 * run.directory.result()["num_parameters"]
    assert states <= sum(sizes) <= 1.3 * states


@pytest.mark.parametrize(
    ("ranks", "name"), among_runs([(2, f"gpt2.{shape}.2") for shape in ("zero0", "zero1", "zero3", "zero3-all")])
)
def test_each_rank_writes_only_its_own_files(observed, ranks, name):
    run = observed(ranks, name)
    first, second = (set(files) for files in run.files_by_rank)
    assert not first & second
    for rank, files in enumerate((first, second)):
        assert f"rank-{rank:03d}.pt" in files
        assert not {f for f in files if f"pp_rank_{1 - rank}_" in f}
        if run.config.engine.zero_stage > 0:
            assert any(f"pp_rank_{rank}_" in file for file in files)
    path = checkpoint.latest(run.directory)
    listed = json.loads((path / MANIFEST).read_text())["files"]
    assert {f for f in listed if f.endswith(".pt")} == (first | second) - {"trainer.json"}
    assert not [p for p in path.parent.iterdir() if p != path], "nothing unfinished is left"


def test_an_export_does_not_overwrite(observed, tmp_path):
    run = observed(2, "gpt2.zero1.2")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        exported(run, tmp_path)
