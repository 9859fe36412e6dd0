"""Plans: known answers, agreement with measured runs, and the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.arguments import changed
from tutorial_lib.cli import build_parser, main, plan_commands, plan_text
from tutorial_lib.cli.options import given
from tutorial_lib.cli.plan_models import tp_engines
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.embedded import model_directory
from tutorial_lib.engine.deepspeed.config import apply_file, build
from tutorial_lib.models.dimensions import from_config, measure, read_config
from tutorial_lib.theory import traffic
from tutorial_lib.theory.cost import Candidate
from tutorial_lib.theory.dimensions import PUBLISHED, Dimensions, derive
from tutorial_lib.theory.known_models import HUB_NAMES, MODELS
from tutorial_lib.theory.layout_reasons import against
from tutorial_lib.theory.layouts import FSDP_STRATEGIES, Cluster, Workload
from tutorial_lib.theory.plan import plan, something_fits
from tutorial_lib.theory.remedies import faster_than_offload, remedies, smallest_gpus
from tutorial_lib.theory.search import candidate_layouts

SEVEN = derive(7e9)
GPT2 = Dimensions(
    layers=4, hidden=96, heads=8, vocabulary=2048, positions=512, qkv_bias=True, bias=True, norm_vectors=2, tied=True
)


FIXED: dict[str, Any] = {"micro_batch": 1, "checkpointing": "none"}


def work(num_params: float = 7e9, **changes: Any) -> Workload:
    """Return a workload in which only the layout is left to choose."""
    given = {"num_params": int(num_params), "dimensions": derive(num_params), "seq_length": 2048, **FIXED}
    return Workload(**{**given, **changes})


def cluster(gpus: int = 8, gigabytes: float = 80, **changes: Any) -> Cluster:
    return Cluster(gpus=gpus, gpu_memory=gigabytes * 1e9, **changes)


def find(candidates: list[Candidate], **wanted: Any) -> Candidate:
    wanted = {"tp": 1, "offload": "none", **wanted}
    found = [c for c in candidates if all(getattr(c.layout, key) == value for key, value in wanted.items())]
    assert len(found) == 1
    return found[0]


# --- dimensions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_params", "row_biases"),
    [("gpt2", 693_312, True), ("qwen2", 677_472, False), ("bloom", 644_352, True)],
)
def test_dimensions_count_what_a_real_model_has(name: str, num_params: int, row_biases: bool) -> None:
    """Compare Psi and R from the dimensions with the real model's parameters on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from tutorial_lib.models import load_config

    config = load_config(f"embedded/{name}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    dimensions = from_config(config)
    assert dimensions.num_params == sum(sizes.values()) == num_params
    # AutoTP divides only projections, and not the biases that are added after an all-reduce.
    norms_and_embeddings = ("wte", "wpe", "ln_", "embed_tokens", "layernorm", "norm.", "word_embeddings")
    summed = ("attn.c_proj.bias", "mlp.c_proj.bias", "attention.dense.bias", "dense_4h_to_h.bias")
    replicated = [key for key in sizes if any(part in key for part in norms_and_embeddings + summed)]
    assert any(key.endswith(summed) for key in replicated) == row_biases
    assert dimensions.replicated_params("deepspeed") == sum(sizes[key] for key in replicated)
    layer = sum(size for key, size in sizes.items() if ".0." in key)
    assert dimensions.layer_params == layer


def test_published_dimensions_count_published_parameters() -> None:
    """Llama 2 7B has 6,738,415,616 parameters, and Qwen2-7B has 7,615,616,512."""
    shared: dict[str, Any] = {"gated": True, "column_layers": 5}
    llama = Dimensions(layers=32, hidden=4096, heads=32, vocabulary=32000, intermediate=11008, **shared)
    assert llama.num_params == 6_738_415_616
    qwen = Dimensions(
        layers=28, hidden=3584, heads=28, kv_heads=4, vocabulary=152064, intermediate=18944, qkv_bias=True, **shared
    )
    assert qwen.num_params == 7_615_616_512


@pytest.mark.parametrize(("num_params", "layers", "hidden"), PUBLISHED)
def test_derived_dimensions_are_near_published_ones(num_params: float, layers: int, hidden: int) -> None:
    derived = derive(num_params)
    assert derived.num_params == pytest.approx(num_params, rel=0.05)
    assert derived.layers == pytest.approx(layers, rel=0.12)
    assert derived.hidden == pytest.approx(hidden, rel=0.01)
    assert derived.heads % 4 == 0


def test_given_dimensions_are_kept() -> None:
    derived = derive(7e9, layers=32, hidden=4096, heads=64, vocabulary=50_000)
    assert (derived.layers, derived.hidden, derived.heads, derived.vocabulary) == (32, 4096, 64, 50_000)
    assert derive(7e9, layers=32).layers == 32
    assert derive(7e9, heads=40).hidden % 40 == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_params=7), "such as 7e9"),
        (dict(num_params=70e9, layers=32, hidden=4096), "make 6.7 B parameters, not 70 B"),
        (dict(num_params=7e9, hidden=4096, heads=33), "not a multiple of heads=33"),
    ],
)
def test_impossible_dimensions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        derive(**arguments)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_papers_table() -> None:
    """Figure 1 of arXiv:1910.02054 has 7.5 B parameters on 64 ranks. With accumulation, stage 1 holds all gradients."""
    candidates = plan(work(7.5e9, global_batch=128), cluster(64))
    for stage, gigabytes in enumerate((120, 31.4, 16.6, 1.9)):
        assert round(find(candidates, zero_stage=stage).states / 1e9, 1) == gigabytes


@pytest.mark.parametrize(
    ("precision", "stage", "offload", "measured"),
    [
        # Lab 01 shows these state bytes per rank, measured on two ranks of the embedded GPT-2.
        ("fp32", 0, "none", 11_092_992),
        ("fp32", 1, "none", 8_363_136),
        ("fp32", 2, "none", 8_363_136),
        ("fp32", 2, "optimizer", 8_319_744),
        ("fp32", 3, "none", 6_933_120),
        ("fp32", 3, "all", 6_933_120),
        ("bf16", 1, "none", 6_261_504),
        ("bf16", 2, "none", 6_261_504),
        ("bf16", 3, "none", 5_546_496),
    ],
)
def test_states_agree_with_measured_runs(precision: str, stage: int, offload: str, measured: int) -> None:
    tiny = Workload(num_params=GPT2.num_params, dimensions=GPT2, seq_length=128, precision=precision, **FIXED)
    candidate = find(plan(tiny, cluster(2)), zero_stage=stage, offload=offload)
    total = candidate.states + candidate.host / 2
    assert total == pytest.approx(measured, rel=0.02)
    if stage == 3 or offload != "none" or stage == 0:
        assert total == measured


def test_tensor_parallelism_divides_all_but_replicated_parameters() -> None:
    candidate = find(plan(work(), cluster()), tp=8, zero_stage=0)
    replicated = SEVEN.replicated_params("deepspeed")
    assert candidate.states == 16 * (-(-(7_000_000_000 - replicated) // 8) + replicated)


def test_fsdp2_computes_a_separate_output_layer_in_full_on_every_rank() -> None:
    """AutoTP splits it, so each of its ranks computes an eighth."""
    full, split = (find(plan(work(), cluster(), engine), tp=8, zero_stage=stage, sequence_parallel=False)
                   for engine, stage in (("fsdp", 3), ("deepspeed", 0)))  # fmt: skip
    output = 6 * SEVEN.vocabulary * SEVEN.hidden
    assert full.states - split.states == 16 * 7 / 8 * SEVEN.vocabulary * SEVEN.hidden
    seconds = full.tokens * 7 / 8 * output / (cluster().gpu_flops * cluster().efficiency)
    assert full.compute_seconds - split.compute_seconds == pytest.approx(seconds)


# --- traffic and time -------------------------------------------------------------------------------------------------


def test_traffic_matches_the_paper() -> None:
    candidates = plan(work(gradient_reduction="reduce_scatter"), cluster())
    ring = 7 / 8
    for stage, multiple in ((1, 2), (2, 2), (3, 3)):
        sent = find(candidates, zero_stage=stage)
        assert sent.dp_traffic == pytest.approx(ring * multiple * 7e9 * 2)
        assert sent.tp_traffic == 0
    # Eight micro-batches pass through the only group, with four all-reduces of s h elements in each layer.
    group = find(candidates, zero_stage=0, tp=8)
    assert group.dp_traffic == 0 and group.accumulation == 8
    assert group.tp_traffic == pytest.approx(2 * ring * 8 * SEVEN.layers * 4 * 2048 * SEVEN.hidden * 2)


def test_a_small_model_stays_gathered_between_forward_and_backward() -> None:
    """Runs of the tiny models send 2 Psi at stage 3 with DeepSpeed's defaults, and 3 Psi without live parameters."""
    for live, multiple in ((1_000_000_000, 2), (0, 3)):
        tiny = Workload(num_params=GPT2.num_params, dimensions=GPT2, seq_length=128, precision="fp32", live_params=live,
                        **FIXED)  # fmt: skip
        assert find(plan(tiny, cluster(2)), zero_stage=3).dp_traffic == multiple * GPT2.num_params * 4 / 2


def test_accumulation_repeats_what_stages_2_and_3_send() -> None:
    for reduction, stage_2 in (("reduce_scatter", 2), ("all_reduce", 7 / 3)):
        once, thrice = (plan(work(global_batch=8 * n, gradient_reduction=reduction), cluster()) for n in (1, 3))
        sent = [find(thrice, zero_stage=s).dp_traffic / find(once, zero_stage=s).dp_traffic for s in (1, 2, 3)]
        assert sent == pytest.approx([1, stage_2, 3])


def test_gradients_are_reduced_as_deepspeed_does_by_default() -> None:
    """Lesson 01 counts 3 Psi for stages 1 and 2: an all-reduce of gradients, and an all-gather of weights."""
    sent = [find(plan(work(), cluster()), zero_stage=stage).dp_traffic for stage in (0, 1, 2, 3)]
    assert sent == pytest.approx([7 / 8 * multiple * 7e9 * 2 for multiple in (2, 3, 3, 3)])


def test_tensor_parallelism_and_zero_3_cross_at_four_and_a_half_hidden_sizes() -> None:
    layers, hidden = 32, 4096
    psi = 12 * layers * hidden**2
    tokens = traffic.tensor_parallel_crossover(psi, layers, hidden)
    assert tokens == 4.5 * hidden
    sent = traffic.tensor_parallel_volume(layers, 1, int(tokens), hidden, 8).ring_elements(8)
    assert sent == pytest.approx(traffic.zero_volume(psi, 3).ring_elements(8))
    assert traffic.tensor_parallel_crossover(psi, layers, hidden, column_layers=5) == pytest.approx(tokens * 4 / 7)


def test_a_plan_crosses_where_the_formula_says() -> None:
    """Tensor parallelism sends less than ZeRO-3 below the crossover, and more above it."""
    crossover = traffic.tensor_parallel_crossover(7_000_000_000, SEVEN.layers, SEVEN.hidden)
    for factor, less in ((0.9, True), (1.1, False)):
        candidates = plan(work(seq_length=int(factor * crossover / 8)), cluster(gigabytes=1000))
        assert (find(candidates, zero_stage=0, tp=8).tp_traffic < find(candidates, zero_stage=3).dp_traffic) is less


def test_a_ring_over_nodes_uses_each_members_share_of_the_network() -> None:
    assert traffic.bus_bandwidth(8, 8, 300, 25) == 300
    assert traffic.bus_bandwidth(8, 16, 300, 25) == 200
    assert traffic.bus_bandwidth(1, 2, 300, 25) == 25
    assert traffic.bus_bandwidth(8, 16, 300, 100) == 300


def test_a_larger_share_of_the_peak_is_a_shorter_step() -> None:
    times = [find(plan(work(), cluster(efficiency=e)), zero_stage=1).compute_seconds for e in (0.45, 0.9)]
    assert times[0] == pytest.approx(2 * times[1])


def test_recomputing_everything_costs_a_third_and_selectively_an_eighth() -> None:
    """Layers are recomputed, but never the output layer."""
    llama = MODELS["llama-3-8b"]
    seconds = [
        find(plan(work(8e9, dimensions=llama, checkpointing=how), cluster(8, 1000)), zero_stage=1).compute_seconds
        for how in ("none", "selective", "full")
    ]
    assert seconds[2] / seconds[0] == pytest.approx(4 / 3, rel=0.03)
    assert seconds[1] / seconds[0] == pytest.approx(1 + 0.365 / 3, rel=0.02)


def test_recomputing_takes_time_even_if_most_of_a_model_is_its_vocabulary() -> None:
    """The dimensions' embeddings alone have 15 % more elements than the size says."""
    dims = derive(1e7, hidden=64, layers=1, vocabulary=90_000)
    seconds = [
        find(plan(work(1e7, dimensions=dims, checkpointing=how), cluster(2)), zero_stage=1).compute_seconds
        for how in ("none", "selective", "full")
    ]
    assert seconds[0] < seconds[1] < seconds[2]


# --- who wins ---------------------------------------------------------------------------------------------------------


def test_seven_billion_on_eight_of_80_gb() -> None:
    """Plain data parallelism does not fit; the stages are equally fast, so the least sharding that fits wins."""
    candidates = plan(work(), cluster())
    best = candidates[0]
    assert (best.layout.name, best.layout.dp, best.layout.tp, best.layout.offload) == ("ZeRO-1", 8, 1, "none")
    assert find(candidates, zero_stage=0).problem.startswith("too large by")
    assert find(candidates, zero_stage=3).slower.startswith("as fast")
    assert find(candidates, zero_stage=0, tp=8).slower.endswith("slower: launches")
    assert find(candidates, zero_stage=2, offload="optimizer").slower.endswith("slower: offload")


def test_a_model_that_fits_unsharded_is_not_divided() -> None:
    for engine, plain in (("deepspeed", "ZeRO-0"), ("fsdp", "no_shard")):
        best, *others = plan(work(1e9, micro_batch=16), cluster(8, 200), engine)
        assert (best.layout.name, best.layout.tp, best.layout.offload) == (plain, 1, "none")
        assert find(others, zero_stage=3).slower == "as fast; more knobs"


def test_offload_time_does_not_depend_on_the_micro_batch() -> None:
    """A published difference is therefore informative, even if its micro-batch is unknown (docs/planner-errors.md)."""
    added = []
    for micro_batch, checkpointing in ((1, "none"), (2, "full"), (4, "full")):
        candidates = plan(work(micro_batch=micro_batch, checkpointing=checkpointing), cluster(gigabytes=100))
        sharded, offloaded = (find(candidates, zero_stage=3, offload=o) for o in ("none", "all"))
        assert offloaded.memory < sharded.memory
        added.append(offloaded.seconds - sharded.seconds)
    assert added == pytest.approx([added[0]] * 3)


def test_offload_traffic_over_the_host_link() -> None:
    """The bytes per shard element are counted by hand. With an infinitely fast Adam, only transfers take time."""
    machine = cluster(gigabytes=1000, host_adam=1e30, host_link=1e9)
    shard = 7e9 / 8

    def per_element(engine: str, **wanted: Any) -> float:
        return find(plan(work(global_batch=16), machine, engine), **wanted).offload_seconds * 1e9 / shard

    # With two micro-batches, FSDP2 fetches fp32 shards for each forward and backward pass, and sends fp32 gradients to
    # the host once.
    assert per_element("fsdp", strategy="full_shard", offload="all") == pytest.approx(2 * 2 * 4 + 4)
    assert per_element("fsdp", strategy="shard_grad_op", offload="all") == pytest.approx(2 * 4 + 4)
    # DeepSpeed sends fp32 gradients to the host and fetches 16-bit parameters. Stage 3 also moves 16-bit gradients from
    # the host and back.
    assert per_element("deepspeed", zero_stage=1, offload="optimizer") == pytest.approx(4 + 2)
    assert per_element("deepspeed", zero_stage=2, offload="optimizer") == pytest.approx(2 * 4 + 2)
    assert per_element("deepspeed", zero_stage=3, offload="optimizer") == pytest.approx(4 + 2 * 2 * 2 + 2)
    assert per_element("deepspeed", zero_stage=3, offload="all") == pytest.approx(4 + 2 * 2 * 2 + 2 * 2 * 2)


def test_the_host_holds_gradients_in_fp32() -> None:
    """On the host, a parameter takes 2 + 4 + 12 bytes, as in runs that ``engine/expected_states.py`` describes."""
    everything = find(plan(work(), cluster()), zero_stage=3, offload="all")
    assert everything.host == 18 * 7e9
    optimizer = find(plan(work(), cluster()), zero_stage=2, offload="optimizer")
    assert optimizer.host == 16 * 7e9


def test_tensor_parallelism_stays_in_a_node_and_divides_heads() -> None:
    found = candidate_layouts(work(), cluster(32, gpus_per_node=4))
    assert {layout.tp for layout in found} == {1, 2, 4}
    assert all(layout.dp * layout.tp == 32 for layout in found)
    grouped = dataclasses.replace(SEVEN, kv_heads=2)
    assert {layout.tp for layout in candidate_layouts(work(dimensions=grouped), cluster())} == {1, 2}


def test_fsdp_holds_full_gradients_only_where_it_reduces_them_once_per_step() -> None:
    accumulating = plan(work(7e9, dimensions=SEVEN, global_batch=16, allow_missing=False), cluster(8), "fsdp")
    once = find(plan(work(global_batch=8), cluster(8), "fsdp"), strategy="full_shard")
    last = find(accumulating, strategy="full_shard")
    assert (once.accumulation, last.accumulation) == (1, 2)
    assert last.states - once.states == 4 * 7e9 * 7 / 8, "full gradients instead of a shard"
    assert last.dp_traffic - once.dp_traffic == pytest.approx(7 / 8 * 2 * 2 * 7e9), "two more gathers, no reduction"

    # FSDP2's default reduces with every micro-batch. It holds fewer bytes and sends more, so it may fit where waiting
    # does not.
    each = find(plan(work(global_batch=16, allow_missing=True), cluster(8, 48), "fsdp"), strategy="full_shard")
    assert each.layout.reduction == "each" and each.states == once.states
    assert each.dp_traffic == 2 * once.dp_traffic
    assert not each.missing and not last.missing


def test_hybrid_shards_within_a_node_and_waits_less_for_the_network() -> None:
    candidates = plan(work(), cluster(32, intra_node_bandwidth=300e9, inter_node_bandwidth=25e9), "fsdp")
    assert {c.layout.strategy for c in candidates} == set(FSDP_STRATEGIES)
    assert {c.layout.shard_size for c in candidates if c.layout.tp == 1} == {None, 8, 16}
    hybrid, full = (
        find(candidates, strategy=name, shard_size=size) for name, size in (("hybrid", 8), ("full_shard", None))
    )
    assert hybrid.states == 4 * full.states == 16 * 7e9 / 8
    # A shard is all-reduced over four nodes, while the eight ranks of a node exchange 16-bit parameters in two gathers,
    # and reduce fp32 gradients.
    inside, across = 7 / 8 * 7e9 * (2 * 2 + 4), 2 * 3 / 4 * 7e9 / 8 * 4
    assert hybrid.dp_traffic == pytest.approx(inside + across)
    assert hybrid.dp_seconds == pytest.approx(max(inside / 300e9, across / 25e9))
    assert hybrid.dp_seconds < full.dp_seconds
    assert all(c.layout.strategy != "hybrid" for c in plan(work(), cluster(8), "fsdp"))


def test_offload_needs_host_memory() -> None:
    candidates = plan(work(), cluster(2, 40, host_memory=50e9))
    assert find(candidates, zero_stage=3, offload="all").problem == "host too small by 76.0 GB"


# --- nothing fits, nothing possible -----------------------------------------------------------------------------------


def test_fewer_gpus_are_named_if_they_are_as_fast(capsys: pytest.CaptureFixture[str]) -> None:
    """If the network between two nodes is slow enough, one of them alone trains as fast as both."""
    question = ["plan", "--model-size", "7e9", "--gpus", "16", "--gpu", "a100-80", "--bandwidth-between"]
    assert main([*question, "0.1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fewer_gpus"].startswith("--gpus 8: ")
    assert main([*question, "0.1"]) == 0
    shown = capsys.readouterr().out
    totals = re.search(
        r"Fewer GPUs are as fast: --gpus 8 gives ([\d,]+) tokens/s in total; all 16 give ([\d,]+)\.", shown
    )
    assert totals
    eight, sixteen = (float(number.replace(",", "")) for number in totals.groups())
    assert eight >= 0.95 * sixteen
    assert main([*question, "25", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fewer_gpus"] is None


def test_gpus_that_need_no_offload_are_a_remedy_of_their_own() -> None:
    dims = MODELS["llama-3-70b"]
    task = Workload(num_params=dims.num_params, dimensions=dims, seq_length=2048)
    found = {remedy.change: remedy.best for remedy in remedies(task, cluster(8), "fsdp")}
    assert found["--gpus 16, the fewest of this kind on which it fits"].layout.offload == "all"
    assert found["--gpus 24, the fewest on which it fits without offload"].layout.offload == "none"


def test_larger_gpus_are_a_remedy_without_offload() -> None:
    """Neither offloaded layouts count, which need less memory, nor those that do not divide the batch and never fit."""
    dims = MODELS["llama-3-70b"]
    for engine, global_batch in itertools.product(("deepspeed", "fsdp"), (None, 4)):
        task = Workload(num_params=dims.num_params, dimensions=dims, seq_length=2048, global_batch=global_batch)
        machine = cluster(8, host_memory=50e9)
        (found,) = [r for r in remedies(task, machine, engine) if r.change.startswith("GPUs with --gpu-memory ")]
        assert found.best.layout.offload == "none"
        needed = float(found.change.split()[3])
        less = dataclasses.replace(machine, gpu_memory=(needed - 1) * 1e9)
        assert not plan(task, less, engine)[0].fits


def test_remedies_do_what_they_say() -> None:
    task, small = work(micro_batch=16), cluster(8, 40, host_memory=1e9)
    assert not plan(task, small)[0].fits
    advice = remedies(task, small)
    micro_batch = next(int(r.change.split()[1]) for r in advice if r.change.startswith("--micro-batch"))
    assert plan(dataclasses.replace(task, micro_batch=micro_batch), small)[0].fits
    assert not plan(dataclasses.replace(task, micro_batch=2 * micro_batch), small)[0].fits


@pytest.mark.parametrize("size", [7e9, 70e9, 175e9])
def test_fewer_gpus_than_smallest_gpus_returns_do_not_fit(size: float) -> None:
    task, machine = work(size), cluster(1, host_memory=1e9)
    smallest = smallest_gpus(task, machine)
    assert smallest is not None
    fits: Callable[[int], bool] = lambda n: plan(task, dataclasses.replace(machine, gpus=n))[0].fits  # noqa: E731
    assert fits(smallest)
    fewer = itertools.chain(range(1, min(smallest, 9)), range(16, smallest, 8))
    assert not any(fits(n) for n in fewer)


def test_remedies_suit_short_sequences_and_narrow_models() -> None:
    """The usual 8 chunks are more than 4 tokens, and the usual rank of 16 is more than a hidden size of 8."""
    short = work(seq_length=4, micro_batch=25_000, checkpointing="full")
    assert "--loss-chunks 4" in [remedy.change for remedy in remedies(short, cluster())]
    narrow = work(1e7, dimensions=derive(1e7, hidden=8, layers=13_000), moments="8bit")
    assert remedies(narrow, cluster(1, 0.05, host_memory=1e6))
    for task in (dataclasses.replace(short, loss_chunks=5), dataclasses.replace(narrow, lora_rank=16)):
        with pytest.raises(ValueError, match=r"Write a smaller number, such as [48]\."):
            plan(task, cluster())


def test_changes_all_together_name_the_options_to_leave_out() -> None:
    """They choose a batch of their own, and may use what this course's engines lack."""
    dims = MODELS["llama-3-70b"]
    task = Workload(
        num_params=dims.num_params, dimensions=dims, seq_length=2048, global_batch=7, checkpointing="none",
        micro_batch=16, allow_missing=False,
    )  # fmt: skip
    (together,) = remedies(task, cluster(16, 24, host_memory=1e9), "fsdp")
    assert together.change.endswith(" --gpus 40 without --global-batch and --only-here, all together")


@pytest.mark.parametrize(
    ("per_node", "batch", "gigabytes", "fewest"), [(1, 24, 80, 24), (2, 100, 40, 50), (4, 24, 40, 48), (8, 12, 40, 48)]
)
def test_the_fewest_gpus_that_share_a_global_batch(per_node: int, batch: int, gigabytes: int, fewest: int) -> None:
    """On two, four, eight ... nodes, nothing that fits can take equal shares of these batches."""
    dims = MODELS["llama-2-70b"]
    task = Workload(num_params=dims.num_params, dimensions=dims, seq_length=1024, global_batch=batch)
    machine = cluster(1, gigabytes, gpus_per_node=per_node, host_memory=1e9)
    assert smallest_gpus(task, machine) == fewest
    counts = itertools.chain(range(1, per_node), range(per_node, fewest, per_node))
    assert not any(something_fits(task, dataclasses.replace(machine, gpus=gpus)) for gpus in counts)


def test_a_global_batch_that_does_not_divide() -> None:
    task = work(global_batch=12, micro_batch=8)
    assert plan(task, cluster())[0].problem == "global batch not divisible by 8"
    assert "--global-batch 64 instead of 12" in [remedy.change for remedy in remedies(task, cluster())]


# --- the command ------------------------------------------------------------------------------------------------------

USUAL = ["plan", "--model-size", "7e9", "--gpus", "8", "--gpu-memory", "80"]


def test_the_table_fits_100_columns_and_names_the_winner(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--engine", "fsdp"], ["--gpus", "512"], ["--model-size", "1e12"], ["--global-batch", "100001"],
                 ["--activation-checkpointing"], ["--gradient-reduction", "reduce_scatter"]):  # fmt: skip
        main(changed(USUAL, more))
        shown = capsys.readouterr().out
        assert max(map(len, shown[: shown.index("\n\nBest" if "Best" in shown else "\n\nNothing")].splitlines())) <= 100
    assert main(USUAL) == 0
    shown = capsys.readouterr().out
    assert "Best: dp=8 tp=1 ZeRO-1, offload none, micro-batch 2. Of 29 layouts, 27 fit." in shown
    assert "dimensions: llama-2-7b's, the public model of about this size" in shown
    assert "peak may be below state + activ + bufs" in shown


@pytest.mark.parametrize(
    ("more", "assumed"),
    [
        ([], "2 forward, 5 backward (AutoTP: 5 column-parallel layers)"),
        (["--engine", "fsdp"], "2 forward, 2 backward (Megatron's plan)"),
        (["--activation-checkpointing"], "2 forward, 1 recomputed, 5 backward (AutoTP: 5 column-parallel layers)"),
        ([], "gradients of stages 1 and 2: all_reduce (DeepSpeed's default; reduce_scatter sends half)"),
        (
            ["--gradient-reduction", "reduce_scatter"],
            "stages 1 and 2: reduce_scatter (as in the paper; DeepSpeed's default is",
        ),
        (["--engine", "fsdp"], "gradients: reduced in fp32; once per step, or with every micro-batch"),
    ],
)
def test_assumptions_about_communication_are_printed(
    more: list[str], assumed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "--model", "embedded/qwen2", "--gpus", "8", "--gpu-memory", "1", *more])
    shown = capsys.readouterr().out
    assert assumed in shown


def test_json_holds_the_full_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*USUAL, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["best"] == document["candidates"][0]
    assert len(document["candidates"]) == 29
    best = document["best"]
    assert 0 < best["memory"] <= best["states"] + best["activations"] + best["buffers"]
    assert document["run"]["settings"]["zero_stage"] == 1 and document["why"]
    assert {"dp_traffic", "tp_traffic", "seconds", "slower", "problem"} <= set(best)
    assert document["workload"]["dimensions"]["hidden"] == 4096 and "fragmentation" in document["left_out"]


def test_nothing_fits_is_exit_code_2_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model-size", "175e9", "--gpus", "8", "--gpu-memory", "80"]
    assert main(arguments) == 2
    shown = capsys.readouterr().out
    assert "--gpus 24, the fewest" in shown and shown.count("2.7 times slower than predicted here") == 1
    assert main([*arguments, "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["best"] is None and document["advice"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus", "12"], "Write 8 or 16"),
        (["--gpus", "0"], "--gpus is 0; the smallest possible value is 1"),
        (["--seq-length", "1"], "--seq-length is 1; the smallest possible value is 2"),
        (["--gpu-memory", "-1"], "--gpu-memory is -1; write a number above 0"),
        (["--gpu-memory", "nan"], "write a finite number"),
        (["--engine", "megatron"], "Write one of: deepspeed, fsdp"),
        (["--precision", "fp8"], "Write one of: bf16, fp16, fp32"),
        (["--gradient-reduction", "sum"], "Write one of: reduce_scatter, all_reduce"),
        (["--efficiency", "45"], "numbers from 0 to 1"),
        (["--model", "gpt2"], "either --model NAME or --model-size"),
        (["--model-size", "7"], "such as 7e9"),
        (["--gpu", "b100"], "Write one of: a100-80"),
        (["--gpu", "v100", "--precision", "bf16"], "v100 has no bf16"),
        (["--moments", "4bit"], "Write one of: fp32, bf16, 8bit"),
        (["--check", "nowhere"], "from its records. Leave out --model-size, --gpus, --gpu-memory."),
        (["--layers", "3", "--hidden", "512"], "Write a model-size"),
        (["--base-bits", "4"], "--base-bits 4 is for frozen weights. Add --lora RANK"),
        (["--loss-chunks", "1000000"], "more than the 2048 tokens of a sequence"),
        (["--lora", "100000"], "a rank above the hidden size, 4096"),
        (["--lora", "8", "--only-here"], "This course's engines do not have LoRA. Leave out --only-here"),
    ],
)
def test_impossible_input_says_what_to_write(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(changed(USUAL, more)) == 2
    assert message in capsys.readouterr().err


def test_a_model_name_too_long_for_a_path_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "1", "--gpu-memory", "80", "--model", "x" * 300]) == 2
    assert "300 bytes long. A path has at most" in capsys.readouterr().err


def test_a_model_under_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(model_directory("embedded/gpt2"))
    assert main(["plan", "--gpus", "1", "--gpu-memory", "80", "--model=~/model", "--json"]) == 0


@pytest.mark.parametrize("size", ["7e9", "7B", "7b", "7000M"])
def test_common_spellings_of_model_sizes_and_gpus(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model-size", size, "--gpus", "8", "--gpu", "H100", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["workload"]["num_params"] == MODELS["llama-2-7b"].num_params and document["gpu"] == "h100"


def test_a_size_that_is_not_a_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--model-size", "sevenB", "--gpus", "8", "--gpu", "h100"])
    assert "'sevenB' is not a number of parameters; write one such as 7e9 or 7B" in capsys.readouterr().err


def test_no_more_tokens_than_learned_positions(capsys: pytest.CaptureFixture[str]) -> None:
    two_gpus = ["--gpus", "2", "--gpu-memory", "80"]
    assert main(["plan", "--model", "embedded/gpt2", *two_gpus, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["settings"]["seq_length"] == 512
    assert main(["plan", "--model", "embedded/gpt2", "--seq-length", "2048", *two_gpus]) == 2
    assert "learned positions for 512 tokens. Write at most 512" in capsys.readouterr().err
    # This size is near GPT-2 XL's. With more tokens than GPT-2 XL takes, a different shape is assumed.
    for length, source in (("1024", "gpt2-xl's"), ("2048", "assumed")):
        assert main(["plan", "--model-size", "1.5e9", "--seq-length", length, *two_gpus, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["dimensions_from"].startswith(source)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (["--model-config", "gpt2", "--random-init"], ["--model published/gpt2 ", " --random-init"]),
        (["--model", "published/gpt2"], ["--model published/gpt2 ", " --random-init"]),
        (["--model", "embedded/gpt2-small"], ["--model embedded/gpt2-small ", " --random-init"]),
        (["--model-size", "125e6"], ["--model openai-community/gpt2 "]),
    ],
)
def test_the_command_names_the_model_that_was_planned(
    model: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *model, "--gpus", "2", "--gpu", "l4"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words) and ("--random-init" in shown) == (len(words) == 2)


@pytest.mark.parametrize(
    ("question", "lacking"),
    [
        (["--model-size", "1.5e9", "--gpus", "4", "--gpu", "v100", "--engine", "fsdp"], "fp16 under FSDP2"),
        (["--model", "gpt2", "--gpus", "1", "--gpu", "l4", "--lora", "8"], "LoRA"),
        (["--model", "gpt2", "--gpus", "1", "--gpu", "l4", "--moments", "8bit"], "8bit moments"),
    ],
)
def test_no_command_is_printed_that_train_refuses(
    question: list[str], lacking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *question]) == 0
    shown = capsys.readouterr().out
    assert f"This course's engines do not have: {lacking}." in shown
    assert "To run it" not in shown and "that they can run fits" not in shown


def test_only_here_leaves_out_what_is_missing_here(capsys: pytest.CaptureFixture[str]) -> None:
    """Seven sequences fit only one tp=8 group, for which the engines lack stage 0 in 16 bits."""
    question = ["plan", "--model-size", "7e9", "--gpus", "8", "--gpu", "h100", "--global-batch", "7", "--only-here"]
    assert main([*question, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert not any(row["missing"] for row in document["candidates"])
    assert document["run"]["settings"]["zero_stage"] == 1 and document["run"]["settings"]["tp"] == 8
    assert main(question) == 0
    shown = capsys.readouterr().out
    assert "tp=8: without it the layout makes passes of 8 sequences, which do not divide the global batch." in shown


@pytest.mark.parametrize(
    ("model", "splits"),
    [
        ("llama-3-8b", {"deepspeed"}), ("mistral-7b", {"deepspeed"}), ("gpt2-medium", {"fsdp"}),
        ("qwen2-7b", {"deepspeed", "fsdp"}), ("embedded/gpt2", {"fsdp"}), ("embedded/bloom", {"deepspeed", "fsdp"}),
    ],
)  # fmt: skip
def test_only_an_engine_that_can_split_a_model_is_planned_with_tp(
    model: str, splits: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = set()
    for engine in ("deepspeed", "fsdp"):
        main(["plan", "--model", model, "--gpus", "8", "--gpu", "h100", "--engine", engine, "--only-here", "--json"])
        found |= {engine for row in json.loads(capsys.readouterr().out)["candidates"] if row["tp"] > 1}
    assert found == splits


def test_known_models_name_the_engines_that_split_them() -> None:
    from transformers import BloomConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    families = {
        "gpt2": GPT2Config, "bloom": BloomConfig, "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config,
    }  # fmt: skip
    for name, dimensions in MODELS.items():
        family = re.split(r"\W", name)[0]
        assert dimensions.tp_engines == tp_engines(families[family]()), name


def test_offload_says_what_it_takes_and_what_would_be_faster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model-size", "13e9", "--gpus", "4", "--gpu", "a100-40"]) == 0
    shown = capsys.readouterr().out
    host = 18 * MODELS["llama-2-13b"].num_params / 1e9
    assert f"it takes {host:.0f} GB of a node's memory" in shown
    assert "offload: the one published run was 2.7 times slower than predicted here" in shown
    assert "Faster, and without offload:" in shown
    assert "--lora 16" in shown and "--gpus 8, the fewest" in shown
    best, *others = [float(match.replace(",", "")) for match in re.findall(r"([\d,]+) tokens/s per GPU", shown)]
    assert len(others) >= 2 and min(others) > 1.05 * best
    dims = MODELS["llama-2-13b"]
    task, four = Workload(num_params=dims.num_params, dimensions=dims, seq_length=2048), cluster(4, 40)
    endless = dataclasses.replace(plan(task, four)[0], tokens_per_gpu_second=1e9)
    assert faster_than_offload(task, four, "deepspeed", endless) == []


@pytest.mark.parametrize(
    ("question", "slower"),
    [
        (
            ["--model", "gpt2", "--gpus", "2", "--gpu", "l4", "--gradient-reduction", "reduce_scatter"],
            {("ZeRO-1", "none"): "", ("ZeRO-2", "none"): "shards more", ("ZeRO-0", "none"): "holds more memory"},
        ),
        (  # both offload, so offload decides nothing
            ["--model-size", "13e9", "--gpus", "4", "--gpu", "a100-40", "--gpu-memory", "50"],
            {("ZeRO-3", "optimizer"): "", ("ZeRO-3", "all"): "fewer tokens/s"},
        ),
    ],
)
def test_layouts_of_equal_speed_say_what_decided(
    question: list[str], slower: dict[tuple[str, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *question, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["candidates"]
    found = {(row["name"], row["offload"]): row["slower"].removeprefix("as fast; ") for row in rows if row["tp"] == 1}
    assert found.items() >= slower.items()


def test_the_best_here_is_never_less_than_0_percent_slower() -> None:
    (best, *_) = plan(work(1e9), cluster())
    for factor, words in ((1.01, "1 % slower"), (1.001, "as fast"), (0.98, "2 % faster, which counts as a tie")):
        other = dataclasses.replace(best, tokens_per_gpu_second=best.tokens_per_gpu_second / factor)
        assert plan_text.how_much_slower(other, best) == words


def test_long_steps_and_slow_training_are_written_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    slow = ["--gpu-memory", "2000", "--gpu-tflops", "1", "--global-batch", "4096"]
    assert main(["plan", "--model-size", "405e9", "--gpus", "8", *slow]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^0\.\d+ tokens/s per GPU, \d,\d{3},\d{3} s per step", shown, re.MULTILINE)
    assert not re.search(r"\de\+\d", shown) and not re.search(r"\b0 tokens/s", shown)


@pytest.mark.parametrize(
    ("factor", "memory", "words"),
    [
        (1, 1.001, "is as fast, with the same peak"), (1.04, 1.001, "is 4 % faster, with the same peak"),
        (1, 1.02, "peaks at 9.0 GB instead of 8.8"), (1.04, 4.1, "is 4 % faster and peaks at 36.1 GB instead of 8.8"),
        (1, 0.001, "peaks at 0.0088 GB instead of 8.8000"), (1, 4, "peaks at 35.2 GB instead of 8.8"),
        (0.05, 2, "is 1,900 % slower"), (1.5, 2, "is 50 % faster and peaks at 17.6 GB instead of 8.8"),
    ],
)  # fmt: skip
def test_reasons_show_how_layouts_differ(factor: float, memory: float, words: str) -> None:
    best = dataclasses.replace(plan(work(), cluster())[0], memory=8.8e9)
    speed = factor * best.tokens_per_gpu_second
    assert against(best, dataclasses.replace(best, memory=memory * best.memory, tokens_per_gpu_second=speed)) == words


def test_a_named_model_brings_its_dimensions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "embedded/qwen2", "--gpus", "8", "--gpu-memory", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["workload"]["num_params"] == 677_472
    assert {row["tp"] for row in document["candidates"]} == {1, 2, 4}  # four key and value heads
    assert main(["plan", "--model", "embedded/qwen2", "--layers", "2", "--gpus", "8", "--gpu-memory", "1"]) == 2


def test_the_commands_of_a_public_model_load_it_by_its_hub_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "bloom-560m", "--gpus", "1", "--gpu", "a100-80"]) == 0
    assert " --model bigscience/bloom-560m " in capsys.readouterr().out
    assert HUB_NAMES.keys() == MODELS.keys()


def test_an_uncounted_family_is_counted_on_a_model_without_memory(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=160, vocab_size=500
    )
    config.save_pretrained(tmp_path)
    dimensions, num_params = read_config(str(tmp_path))
    model = GPTNeoXForCausalLM(config)
    assert num_params == sum(parameter.numel() for parameter in model.parameters())
    assert dimensions == measure(model)
    assert (dimensions.layers, dimensions.hidden, dimensions.mlp_width, dimensions.gated) == (3, 64, 160, False)
    assert dimensions.num_params == pytest.approx(num_params, rel=0.01)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import T5Config

    T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=64, vocab_size=50).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--gpus", "1", "--gpu", "l4"]) == 2
    assert "is a t5 model, an encoder with a decoder" in capsys.readouterr().err


def test_help_says_that_experts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "a mixture of experts is refused" in " ".join(capsys.readouterr().out.split())


def test_experts_are_refused() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**small, intermediate_size=32, vocab_size=50, num_local_experts=2))
    with pytest.raises(ConfigError, match="mixture of experts"):
        measure(model)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model-size", "7e9", "--gpus", "8", "--gpu", "a100-80"],
        ["--model-size", "7e9", "--gpus", "8", "--gpu", "a100-40", "--global-batch", "64"],
        ["--model-size", "13e9", "--gpus", "4", "--gpu", "a100-40"],
        ["--model-size", "13e9", "--gpus", "4", "--gpu", "a100-40", "--engine", "fsdp"],
        ["--model-size", "70e9", "--gpus", "64", "--gpu", "h100", "--engine", "fsdp", "--seq-length", "8192"],
        ["--model-size", "1e9", "--gpus", "8", "--gpu", "h100", "--engine", "fsdp"],
        ["--model-size", "1e9", "--gpus", "1", "--gpu", "l40s"],
        ["--model-config", "gpt2", "--random-init", "--gpus", "2", "--gpu", "l4"],
        ["--model-size", "7e9", "--gpus", "8", "--gpu", "h100", "--global-batch", "7", "--only-here"],
        ["--model-size", "1.5e9", "--gpus", "4", "--gpu", "v100"],
        ["--model-size", "7e9", "--gpus", "32", "--gpu", "v100"],
        ["--model-size", "1e9", "--gpus", "8", "--gpu", "a100-80", "--precision", "fp32"],
        ["--model-size", "7e9", "--gpus", "8", "--gpu", "a100-80", "--gradient-reduction", "reduce_scatter"],
        ["--model-size", "7e9", "--gpus", "16", "--gpu", "h200", "--engine", "fsdp", "--bandwidth-between", "2"],
    ],
)
def test_the_winner_is_ready_to_run(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings make a configuration, and the command line, with its DeepSpeed file, parses to the same one."""
    assert main(["plan", *arguments, "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    profile = "gpu" if arguments[arguments.index("--gpus") + 1] == "1" else "cluster"
    config = Config.create(profile, **run["settings"])
    assert config.parallel.world_size == int(arguments[arguments.index("--gpus") + 1])

    words = shlex.split(run["line"])
    flags = words[words.index("train") + 1 :]
    if run["deepspeed"]:
        file = tmp_path / plan_commands.DEEPSPEED_FILE
        file.write_text(json.dumps(run["deepspeed"]))
        flags[flags.index(plan_commands.DEEPSPEED_FILE)] = str(file)
    options = build_parser().parse_args(["train", *flags])
    pasted = apply_file(Config.create(options.profile, **given(options)))
    changed_by_file = {"deepspeed", "pin_memory", "bucket_size"}
    same = {name: value for name, value in config.flat().items() if name not in changed_by_file}
    assert {name: value for name, value in pasted.flat().items() if name in same} == same
    if run["deepspeed"]:
        built = build(pasted)
        assert built["zero_optimization"]["stage"] == run["settings"]["zero_stage"]
        assert built["train_batch_size"] == run["settings"]["global_batch"]


def test_planning_a_size_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from tutorial_lib.cli import main; code = main(sys.argv[1:])\n"
        "assert code == 0 and not {'torch', 'transformers', 'numpy', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, *USUAL], check=True, capture_output=True)
