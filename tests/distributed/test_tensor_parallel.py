"""Tensor-parallel runs: their layouts, model states and traffic, and the faults that they detect.

``test_equivalence.py`` compares their training with one plain process. ``test_export.py`` and ``test_resume.py`` cover
their exports and resumes.
"""

from __future__ import annotations

import json
import math
import re

import pytest

from tests.distributed.cases import equivalence
from tests.distributed.observing.probe import ERRORS
from tests.support.models import HIDDEN, LAYERS
from tutorial_lib.theory import memory, traffic

MEASURED = [each for each in equivalence.COMBINATIONS if equivalence.settings(each)["tp"]]
AUTOTP = [each for each in MEASURED if equivalence.settings(each)["engine"] != "fsdp"]
IN_FP32 = [each for each in AUTOTP if equivalence.settings(each)["precision"] != "bf16"]


def num_elements(row):
    return math.prod(row["before"])


@pytest.mark.parametrize(("ranks", "case", "variant"), MEASURED)
def test_the_layout_of_every_run_adds_up(observed, ranks, case, variant):
    run = observed(ranks, f"{case}.{variant}.{ranks}")
    tp = run.config.parallel.tp
    for rank in run.measured:
        rows = rank["layout"]
        assert [row["parameter"] for row in rows] == list(run.parameters)
        assert sum(map(num_elements, rows)) == rank["num_parameters"]
        for row in rows:
            assert tuple(row["before"]) == tuple(run.parameters[row["parameter"]].shape)
            split = list(row["before"])
            if row["dim"] is not None:
                split[row["dim"]] //= tp
            assert split == row["after"]
            assert (row["how"] == "replicated") == (row["dim"] is None)
        hows = {row["how"] for row in rows}
        assert hows == {"column", "row", "replicated"}


@pytest.mark.parametrize(
    ("case", "projections"),
    [
        ("qwen2", {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row",
                   "gate_proj": "column", "up_proj": "column", "down_proj": "row"}),
        ("bloom", {"query_key_value": "column", "self_attention.dense": "row",
                   "dense_h_to_4h": "column", "dense_4h_to_h": "row"}),
    ],
)  # fmt: skip
def test_projections_are_split_and_everything_else_is_replicated(observed, case, projections):
    for row in observed(4, f"{case}.2x2-zero1.4").measured[0]["layout"]:
        found = [how for name, how in projections.items() if f"{name}.weight" in row["parameter"]]
        biases = [how for name, how in projections.items() if f"{name}.bias" in row["parameter"] and how == "column"]
        assert row["how"] == next(iter(found + biases), "replicated"), row["parameter"]
    assert observed(4, "untied.2x2-zero1.4").measured[0]["layout"][-1]["how"] == "column", "separate output layer"


@pytest.mark.parametrize(("ranks", "case", "variant"), [m for m in IN_FP32 if m[1] != "frozen-split"])
def test_model_states_are_what_theory_says_to_the_byte(observed, ranks, case, variant):
    """Each rank has (Psi - R) / t + R parameters, R of them replicated, which ZeRO then divides."""
    run = observed(ranks, f"{case}.{variant}.{ranks}")
    stage, dp, tp = run.config.engine.zero_stage, run.config.parallel.dp, run.config.parallel.tp
    for number, rank in enumerate(run.measured):
        rows, states = rank["layout"], rank["state_bytes"]
        psi = rank["num_parameters"]
        replicated = sum(num_elements(row) for row in rows if row["dim"] is None)
        own = memory.tensor_parallel_params(psi, replicated, tp)
        assert own == sum(math.prod(row["after"]) for row in rows) == (psi - replicated) // tp + replicated
        shard = own if stage < 3 else sum(-(-math.prod(row["after"]) // row["partitions"]) for row in rows)
        if stage == 3:
            # Modules that AutoTP does not split are still partitioned over all ranks, as they were built.
            assert {row["partitions"] for row in rows if row["dim"] is None} <= {dp, dp * tp}
        assert states["parameters"] == 4 * shard
        partition = {0: own, 3: shard}.get(stage) or memory.partition_elements(own, dp, alignment=2)
        moments, master = 8 * partition, 4 * partition if stage else 0
        assert states["optimizer"] == moments + master
        sizes = [math.prod(row["after"]) for row in rows]
        held = memory.reduced_gradients(sizes, dp, number // tp) if stage in (1, 2) else partition
        assert states["gradients"] == 4 * held


ALL_REDUCED = [
    (ranks, f"{case}.{variant}.{ranks}", backward)
    for ranks, variant in ((2, "1x2-zero1"), (4, "2x2-zero0"), (4, "2x2-zero3"), (4, "1x4-zero2"))
    for case, backward in (("qwen2", 5), ("bloom", 2))
]


@pytest.mark.parametrize(("ranks", "name", "backward"), equivalence.among_runs(ALL_REDUCED))
def test_all_reduces_per_layer(observed, ranks, name, backward):
    """Forward has one per row-parallel layer (2), and backward one per column-parallel layer (q, k, v, gate, up)."""
    run = observed(ranks, name)
    for rank in run.measured:
        (row,) = rank["traffic"]["axes"]["tp"]["tensors"]
        assert (row["kind"], row["count"]) == ("all_reduce", LAYERS * (2 + backward))
        assert row["in_backward"] == LAYERS * backward
        tokens, rest = divmod(row["elements"], row["count"] * run.config.micro_batch * HIDDEN)
        assert rest == 0 and tokens <= run.config.data.seq_length
        # Packed rows are full. Others are padded to the longest.
        if run.config.data.batching == "packed":
            assert tokens == run.config.data.seq_length
        volume = traffic.tensor_parallel_volume(
            LAYERS, run.config.micro_batch, tokens, HIDDEN, run.config.parallel.tp, column_layers=backward
        )
        assert rank["traffic"]["axes"]["tp"]["volume"] == volume.total


@pytest.mark.parametrize("name", ["recomputed", "selective"])
def test_recomputing_a_layer_repeats_one_of_its_forward_all_reduces(observed, name):
    """PyTorch stops recomputing at the last tensor that backward needs, before the all-reduce after the MLP."""
    run = observed(2, f"qwen2.1x2-zero1-{name}.2")
    for rank in run.measured:
        axis = rank["traffic"]["axes"]["tp"]
        (row,) = axis["tensors"]
        assert (row["count"], row["in_backward"]) == (LAYERS * (2 + 1 + 5), LAYERS * (1 + 5))
        tokens = row["elements"] // (row["count"] * run.config.micro_batch * HIDDEN)
        expected = traffic.tensor_parallel_volume(
            LAYERS, run.config.micro_batch, tokens, HIDDEN, 2, recompute=True, column_layers=5
        )
        assert (row["elements"], axis["volume"]) == (expected.all_reduce, expected.total)


def test_an_untied_output_layer_all_gathers_the_logits(observed):
    run = observed(4, "untied.2x2-zero1.4")
    by_kind = {row["kind"]: row for row in run.measured[0]["traffic"]["axes"]["tp"]["tensors"]}
    assert by_kind["all_reduce"]["count"] == LAYERS * 7 + 1
    assert by_kind["all_gather"]["count"] == 1
    assert by_kind["all_gather"]["elements"] % (run.config.micro_batch * 2048) == 0


def test_gradients_are_all_reduced_only_over_data_parallel_ranks(observed):
    run = observed(4, "qwen2.2x2-zero0.4")
    rank = run.measured[0]
    (row,) = rank["traffic"]["axes"]["dp"]["tensors"]
    assert (row["kind"], row["elements"]) == ("all_reduce", sum(math.prod(r["after"]) for r in rank["layout"]))


def test_the_check_within_a_group_costs_two_small_all_gathers_a_step(observed):
    """One all-gathers tokens and fingerprints, the other the losses. Stop requests come after the step."""
    bookkeeping = observed(4, "qwen2.2x2-zero0.4").measured[0]["traffic"]["bookkeeping"]
    gathers = [row for row in bookkeeping if row["kind"] == "all_gather"]
    numbers = 4 * (2 + 1)
    assert gathers == [
        {
            "kind": "all_gather",
            "dtype": "int64",
            "count": 2,
            "in_backward": 0,
            "elements": numbers,
            "bytes": 8 * numbers,
        }
    ]


@pytest.mark.parametrize(("ranks", "case", "variant"), [m for m in IN_FP32 if m[1] == "qwen2"])
def test_evaluation_matches_one_process(observed, ranks, case, variant):
    run, reference = observed(ranks, f"{case}.{variant}.{ranks}"), observed(1, f"{case}.reference")
    for name in ("eval_loss_before", "eval_loss"):
        assert run.directory.result()[name] == pytest.approx(reference.directory.result()[name], rel=1e-6)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (
            "data.sampler_of_the_world",
            "RanksDisagree",
            r"At step 1 ranks \[0, 1\] share every layer, but read different batches, with the fingerprints "
            r"([0-9a-f]{16}), (?!\1)[0-9a-f]{16}\. Check the data loader's arguments: dp_rank and dp_size",
        ),
        (
            "tensor_parallel.seed_of_each_rank",
            "RanksDisagree",
            r"At step 1 ranks \[0, 1\] .* their losses differ: (\d+\.\d{6}), (?!\1)\d+\.\d{6}\. Look at the seed",
        ),
        (
            "tensor_parallel.row_all_reduce_skipped",
            "RanksDisagree",
            r"their losses differ: .* and at the all-reduce of the row-parallel",
        ),
        (
            "tensor_parallel.projections_not_split",
            "ConfigError",
            rf"left {3 * LAYERS} projections unsplit on every rank, e\.g\. model\.layers\.0\.mlp\.gate_proj\.weight\.",
        ),
    ],
)
def test_faults_within_a_tensor_parallel_group_are_detected(launched, directory, fault, error, message):
    launched(2)
    errors = json.loads((directory / "runs" / fault / ERRORS).read_text())
    assert len(errors) == 2, "all ranks raise, none waits for another"
    for found in errors:
        assert found["type"] == error
        assert re.search(message, found["message"]), found["message"]
