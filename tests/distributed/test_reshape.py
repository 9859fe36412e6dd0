"""Reshape: a run saved in one shape resumes in another with the same examples, losses and states.

A shape is the layout of the states: data- and tensor-parallel ranks, the engine, the ZeRO stage, sharding and
offload. The runs have epochs of five steps, stop after step 3, and go on to step 8.
"""

from __future__ import annotations

import argparse
import json
import shutil

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal

from tests.distributed.cases import equivalence, reshaping, small_runs
from tests.distributed.cases.interruption import END, STOP
from tests.distributed.faults.checks import assert_same_states
from tests.distributed.observing.comparing import allowed, assert_equal, assert_identical, compare
from tutorial_lib import checkpoint
from tutorial_lib.checkpoint.compatibility import shape
from tutorial_lib.cli import main
from tutorial_lib.config import Config
from tutorial_lib.records import RunDirectory

READ = [
    (1, "gpt2.reference"),
    *((2, f"gpt2.{name}.2") for name in ("zero0", "zero1", "zero2", "zero3", "zero2-optimizer", "zero3-all")),
    *((2, f"gpt2.{name}-bf16.2") for name in ("zero0", "zero1", "zero2", "zero3")),
    *((2, f"gpt2.{name}.2") for name in ("fsdp-full", "fsdp-none", "fsdp-tp2", "fsdp-full-bf16")),
    *((2, f"frozen.{name}.2") for name in ("zero0", "zero1", "zero2", "zero3", "fsdp-tp2")),
    *((2, f"frozen-split.1x2-{name}.2") for name in ("zero0", "zero3")),
    *((2, f"qwen2.1x2-{name}.2") for name in ("zero0", "zero2-optimizer", "zero3-all", "zero1-bf16")),
    *((4, f"{case}.2x2-zero{stage}.4") for case in ("qwen2", "bloom") for stage in range(4)),
    *((4, f"frozen-split.2x2-{name}.4") for name in ("zero1", "zero3")),
    *((4, name) for name in ("gpt2.zero2.4", "gpt2.zero3.4", "odd.fsdp-tp2.4", "untied.fsdp-hybrid.4")),
]


@pytest.mark.parametrize(("ranks", "name"), equivalence.among_runs(READ))
def test_full_tensors_match_the_engines(observed, ranks, name):
    """The engine shows the weights that it computes with, which in 16 bits are rounded copies of the master weights."""
    run = observed(ranks, name)
    full = checkpoint.open_full(checkpoint.latest(run.directory))
    assert list(full.names) == list(run.parameters)
    assert set(full.trained) == run.moments.keys()
    in_16_bits = run.config.engine.name == "deepspeed" and run.config.engine.precision == "bf16"
    for name, expected in run.parameters.items():
        parameter = full.parameter(name)
        assert parameter.dtype == torch.float32
        assert (parameter.bfloat16().float() if in_16_bits else parameter).equal(expected), name
    for name, moments in run.moments.items():
        assert all(full.moment(name, kind).equal(expected) for kind, expected in moments.items()), name
        assert full.adam_step(name) == small_runs.STEPS


@pytest.mark.parametrize(
    ("ranks", "name"),
    equivalence.among_runs(
        [
            *((2, f"gpt2.zero{stage}.2") for stage in (1, 2, 3)),
            (2, "gpt2.zero1-bf16.2"),
            (2, "gpt2.zero3-bf16.2"),
            *((4, f"gpt2.zero{stage}.4") for stage in (2, 3)),
            *((4, f"qwen2.2x2-zero{stage}.4") for stage in (1, 2)),
        ]
    ),
)
def test_full_tensors_match_deepspeeds_own_conversion(observed, tmp_path, ranks, name):
    """Compare with DeepSpeed's universal format, which has a file for every full tensor.

    Stage 3 with AutoTP is left out, because DeepSpeed 0.19.8 treats every parameter as sharded over the data-parallel
    ranks, and its conversion ends in an error.
    """
    source = checkpoint.latest(observed(ranks, name).directory)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source / "engine" / "engine"),
            output_folder=str(tmp_path / "universal"),
            inject_missing_state=True,
            **options,
        )
    )
    full = checkpoint.open_full(source)
    for name in full.trained:
        folder = tmp_path / "universal" / "zero" / name
        for kind in ("fp32", *checkpoint.MOMENTS):
            theirs = torch.load(folder / f"{kind}.pt", weights_only=False)
            theirs = theirs["param"] if isinstance(theirs, dict) else theirs  # at stage 3 it is the tensor itself
            ours = full.parameter(name) if kind == "fp32" else full.moment(name, kind)
            assert ours.equal(theirs.view(ours.shape)), (name, kind)


@pytest.mark.parametrize("name", reshaping.RESHAPED)
def test_a_run_resumes_in_another_shape(observed, reshaped, directory, name):
    """The new start reads each example of the remaining steps once, with any number of ranks."""
    run, reference = reshaped(f"reshaped.{name}"), observed(1, f"uninterrupted-torch.{reshaping.case_of(name)}")
    result, (before, *_) = run.directory.result(), reshaping.ancestors(directory, name)
    assert result["resumed_from"] == before.run.stop_after
    assert result["reshaped_from"] == shape(before.flat())
    if run.config.run.stop_after:
        assert run.examples == reference.examples[STOP : run.config.run.stop_after]
        return
    # The tolerances of both shapes apply.
    bounds: dict[str, float] = {}
    for config in (run.config, *reshaping.ancestors(directory, name)):
        bounds |= {kind: max(size, bounds.get(kind, 0.0)) for kind, size in allowed(config).items()}
    assert_equal(run, reference, **bounds)
    assert len(run.examples) == END - result["resumed_from"]
    assert [row["epoch"] for row in run.rows] == [0] * 5 + [1] * 3, "it goes on into the next epoch"


@pytest.mark.parametrize("name", reshaping.RESHAPED_WITHOUT_TRAINING)
def test_in_16_bits_the_masters_are_kept_and_their_copies_rounded(observed, reshaped, directory, name):
    """The new start stops at once, and must save exactly what it loaded."""
    run = reshaped(f"reshaped.{name}")
    (before, *_) = reshaping.ancestors(directory, name)
    old, new = (checkpoint.open_full(checkpoint.latest(RunDirectory(c.directory))) for c in (before, run.config))
    assert run.examples == [] and run.ranks_agree
    computes_in_16_bits = run.config.engine.name == "deepspeed"
    for name in old.names:
        master = old.parameter(name)
        assert new.parameter(name).equal(master)
        assert run.parameters[name].equal(master.bfloat16().float() if computes_in_16_bits else master)
        assert not master.bfloat16().float().equal(master)
        assert all(new.moment(name, kind).equal(old.moment(name, kind)) for kind in checkpoint.MOMENTS)
        assert new.adam_step(name) == old.adam_step(name) == STOP


def test_random_numbers_are_seeded_again(reshaped, directory):
    """Two resumes from a checkpoint draw the same random numbers. They depend on seed, step and data-parallel rank."""
    once, twice = (reshaped(f"reshaped.{name}") for name in reshaping.RESHAPED_TWICE)
    assert_identical(once, twice)
    assert len(once.examples) == END - STOP


@pytest.mark.parametrize(
    ("fault", "shown_by"),
    [
        ("restore.updates_not_counted", {"loss", "parameters"}),
        ("restore.columns_left_by_rank", {"loss", "grad_norm", "parameters", "exp_avg", "exp_avg_sq"}),
        ("restore.moments_exchanged", {"loss", "parameters", "exp_avg", "exp_avg_sq"}),
    ],
)
def test_the_comparison_detects_an_incomplete_reshape(observed, reshaped, fault, shown_by):
    reference = observed(1, f"uninterrupted-torch.{reshaping.case_of(reshaping.RESHAPE_FAULTS[fault])}")
    differences = compare(reshaped(fault), reference)
    assert shown_by <= differences.found.keys(), differences.found


def test_the_reshape_command_creates_a_run_that_can_be_resumed(observed, launched, directory, capsys):
    """Two ranks of ZeRO-1 become one process of plain torch."""
    launched(2)
    source, storage = reshaping.saved(directory, "zero1"), directory / "runs"
    files = {path: path.read_bytes() for path in source.directory.rglob("*") if path.is_file()}
    given = ["reshape", str(source.directory), "--name", "made", "--engine", "torch", "--dp", "1", "--json"]
    assert main(given) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["run"] == str(storage / "made") and made["step"] == STOP
    assert made["shape"] == {"engine": "torch", "device": "cpu", "dp": 1, "tp": 1}
    assert made["reshaped_from"] == shape(source.flat())
    assert {path: path.read_bytes() for path in files} == files, "the old run must not change"
    assert not [path.name for path in storage.iterdir() if path.name.startswith(".")]
    run = RunDirectory(storage / "made")
    assert run.rows() == RunDirectory(source.directory).rows()
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{STOP:08d}"]
    assert Config.from_json(run.config_file.read_text()).directory == run.path
    assert_same_states(run, RunDirectory(source.directory))
    assert sorted(path.name for path in (checkpoint.latest(run) / "engine").iterdir()) == ["model.pt", "optimizer.pt"]
    assert main(given) == 2
    assert f"There is already a run {storage / 'made'}" in capsys.readouterr().err
    shutil.rmtree(run.path)
