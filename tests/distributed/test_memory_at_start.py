"""Memory at start: at stage 3 and with FSDP2, no rank ever holds the full model, even if AutoTP splits it.

Memory is measured while the model is built or read, and until the engine can train.

glibc keeps freed blocks of up to 32 MiB for later. With the gaps between them, the resident set grows far above the
memory in use, even above the size of the full model. The settings below make glibc return all blocks above 256 KiB.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.cases import small_runs
from tests.support.models import altered_model
from tutorial_lib import launch
from tutorial_lib.models import load_model, load_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

MIB = 2**20
SLACK = 16 * MIB
"""Bytes allowed for communication buffers and Python's own allocations."""


@pytest.fixture(scope="module")
def sizes(directory):
    """Write a model of 59 million parameters with its weights, and return its bytes and those of one layer."""
    altered_model("embedded/gpt2", directory / "large", n_embd=768, n_head=12, n_layer=8)
    (directory / "large" / "model.safetensors").unlink()
    model = load_model(str(directory / "large"), random_init=True)
    model.save_pretrained(directory / "large-saved")
    load_tokenizer("embedded/gpt2").save_pretrained(directory / "large-saved")
    return measured(directory / "large", lambda outline: outline.transformer.h[0])


@pytest.fixture(scope="module")
def split_sizes(directory):
    """Write a model that AutoTP splits, without weights, and return its bytes and those of one layer."""
    changes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048, "num_hidden_layers": 9}
    altered_model("embedded/qwen2", directory / "large-split", layer_types=["full_attention"] * 9, **changes)
    (directory / "large-split" / "model.safetensors").unlink()
    return measured(directory / "large-split", lambda outline: outline.model.layers[0])


def measured(model, layer_of):
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    full, layer = (sum(p.numel() for p in m.parameters()) * 4 for m in (outline, layer_of(outline)))
    assert full > 200 * MIB
    return full, layer


@pytest.fixture(scope="module", params=[2, 4])
def built(request, directory, sizes, split_sizes):
    """Return the number of ranks, and the bytes by which each rank's memory rose for each kind of run."""
    ranks = request.param
    shared = {"dp": ranks, "zero_stage": 3}
    runs = {
        # This run imports modules and loads libraries, so that the others do not count them.
        "warm-up": {"model": "embedded/gpt2"},
        "drawn": {"model": "large", "random_init": True},
        "read": {"model": "large-saved"},
        "drawn, fsdp": {"model": "large", "random_init": True, "engine": "fsdp"},
        "read, fsdp": {"model": "large-saved", "engine": "fsdp"},
        "drawn, not partitioned": {"model": "large", "random_init": True, "zero_stage": 0},
    }
    split = {"model": "large-split", "random_init": True, "dp": ranks // 2, "tp": 2}
    runs |= {"split": split, "split, not partitioned": {**split, "zero_stage": 1}}
    configs = [
        small_runs.config(directory, name=f"memory-{ranks}-{number}", **(shared | flat))
        for number, flat in enumerate(runs.values())
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**18))
        patch.setenv("MALLOC_TRIM_THRESHOLD_", str(2**18))
        launch.run_all(configs, worker="tests.distributed.workers.memory")
    by_rank = [json.loads((config.directory / "memory.json").read_text()) for config in configs]
    return ranks, dict(zip(runs, by_rank, strict=True))


def bound(ranks, sizes):
    full, layer = sizes
    return full / ranks + layer + SLACK


@pytest.mark.parametrize("how", ["drawn", "read", "drawn, fsdp", "read, fsdp"])
def test_a_rank_holds_its_partition_and_one_layer(built, sizes, record_property, how):
    ranks, rise = built
    assert all(rank["num_parameters"] * 4 == sizes[0] for rank in rise[how])
    peaks = [rank["loading_anonymous"] for rank in rise[how]]
    record_property("peak_mib", [round(peak / MIB) for peak in peaks])
    assert max(peaks) <= bound(ranks, sizes) < sizes[0]
    if "fsdp" not in how:
        # The first rank maps the file and copies from it, and the others do not read values from it. Under FSDP2, every
        # rank maps the file, and touches the pages of its own slices.
        assert max(rank["loading"] for rank in rise[how][1:]) <= bound(ranks, sizes)


def test_without_partitioning_the_bound_is_exceeded(built, sizes):
    ranks, rise = built
    assert min(rank["loading_anonymous"] for rank in rise["drawn, not partitioned"]) > bound(ranks, sizes)


@pytest.mark.parametrize("how", ["drawn", "read"])
def test_ready_to_train_a_rank_holds_its_share_of_all_states(built, sizes, record_property, how):
    """A parameter has 16 bytes of states in fp32: weight, master weight and two moments. The gradient comes later."""
    ranks, rise = built
    full, layer = sizes
    peaks = [rank["initializing_anonymous"] for rank in rise[how]]
    record_property("peak_mib", [round(peak / MIB) for peak in peaks])
    assert max(peaks) <= 4 * full / ranks + layer + SLACK


@pytest.mark.parametrize("how", ["drawn, fsdp", "read, fsdp"])
def test_ready_to_train_a_rank_of_fsdp_holds_its_parameters(built, sizes, record_property, how):
    """There is no second copy of the parameters. Gradients and moments come with the first step."""
    ranks, rise = built
    peaks = [rank["initializing_anonymous"] for rank in rise[how]]
    record_property("peak_mib", [round(peak / MIB) for peak in peaks])
    assert max(peaks) <= bound(ranks, sizes)


def test_a_split_model_is_never_full_on_one_rank_at_stage_3(built, split_sizes, record_property):
    """The model is built in parts over all ranks. Each layer is then gathered and split; ranks keep their shares."""
    ranks, rise = built
    full, layer = split_sizes
    record_property("peak_mib", [round(rank["loading_anonymous"] / MIB) for rank in rise["split"]])
    assert max(rank["loading_anonymous"] for rank in rise["split"]) <= bound(ranks, split_sizes) < full
    peaks = [rank["initializing_anonymous"] for rank in rise["split"]]
    record_property("peak_mib_ready", [round(peak / MIB) for peak in peaks])
    # A rank holds half of the weights until ZeRO divides them, and its share of 12 more bytes per parameter.
    assert max(peaks) <= full / 2 + 3 * full / ranks + layer + SLACK


def test_below_stage_3_it_is_full_in_host_memory(built, split_sizes, record_property):
    """AutoTP starts from the full model in host memory, and moves the shares to the device one by one."""
    _, rise = built
    peaks = [rank["loading_anonymous"] for rank in rise["split, not partitioned"]]
    record_property("peak_mib", [round(peak / MIB) for peak in peaks])
    # The lowest peak is left out, because the first rank may reuse memory that earlier runs freed in its process.
    assert sorted(peaks)[1] >= split_sizes[0] - SLACK > bound(built[0], split_sizes)
