"""Hugging Face Trainer: it trains like our own loop, and its runs stop, resume and are refused like all others."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.cases import equivalence, small_runs
from tests.distributed.cases.interruption import END, STOP
from tests.support.commands import train_command
from tests.support.launching import interrupt_when
from tests.support.models import HIDDEN
from tutorial_lib import checkpoint, launch
from tutorial_lib.cli import main
from tutorial_lib.cli.train import summary
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.engine.deepspeed.file import DIRECTORY
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer.answers import evaluate_answers

EQUAL: dict[int, list[tuple[str, str]]] = {
    1: [("gpt2", "plain")],
    2: [
        ("gpt2", "plain-accumulated"),
        ("gpt2", "zero0"),
        ("gpt2", "zero3"),
        ("qwen2", "plain"),
        ("qwen2", "zero1"),
        ("qwen2", "zero2_cpu_offload"),
        ("bloom", "zero3_cpu_offload"),
        ("untied", "zero2"),
        ("gpt2", "load-accumulated"),
        ("qwen2", "load"),
        ("bloom", "load"),
    ],
}
"""Cases and variants that must equal our own loop, by number of ranks.

A variant is a DeepSpeed file, ``plain`` (DDP on two ranks) or ``load`` (sharded at load).

Lesson 05 checks the rest: stages 0 to 3 on two processes and 1 to 3 on one, with accumulation.
"""

SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "load": {"shard_at_load": True, "measure": True}}
"""Settings of variants that are not DeepSpeed files."""

ACCUMULATED = {"plain-accumulated": "plain", "load-accumulated": "load"}
"""Variants with one example per micro-batch, and the variant each is based on."""

VOCABULARY = 2048
"""Size of the embedded models' vocabulary."""

INTERRUPTED = ("plain", "zero2_cpu_offload", "zero3")


@pytest.fixture(scope="module")
def files(directory: Path) -> Path:
    """Write copies of the package's DeepSpeed files that take gradient clipping from the run."""
    for path in DIRECTORY.glob("*.json"):
        given = json.loads(path.read_text()) | {"gradient_clipping": "auto"}
        (directory / path.name).write_text(json.dumps(given))
    return directory


def trained(directory: Path, case: str, variant: str, ranks: int) -> Config:
    file = ACCUMULATED.get(variant, variant)
    flat: dict[str, Any] = {"micro_batch": 1} if variant in ACCUMULATED else {}
    flat |= SETTINGS.get(file, {"deepspeed": str(directory / f"{file}.json")})
    name = f"hf-{case}.{variant}.{ranks}"
    return small_runs.config(directory, name=name, engine="trainer", dp=ranks, **flat, **equivalence.CASES[case])


def with_dropout(directory: Path, file: str, name: str) -> Config:
    """Return a run that saves in the middle of an epoch and ends in the next."""
    flat = SETTINGS.get(file, {"deepspeed": str(directory / f"{file}.json")})
    return small_runs.config(
        directory, name=f"hf-{name}.{file}", engine="trainer", dp=2, model="gpt2-dropout", max_examples=40,
        steps=END, evaluate=True, evaluate_every="epoch", max_eval_examples=12, checkpoint_every=STOP,
        **flat,
    )  # fmt: skip


def interrupted(uninterrupted: launch.Run, file: str) -> Config:
    """Copy a run without its later checkpoints, and return the copy's configuration."""
    config = uninterrupted.config.override(name=f"hf-interrupted.{file}")
    shutil.copytree(uninterrupted.directory.path, config.directory)
    for path in RunDirectory(config.directory).checkpoints.iterdir():
        if path.name != f"step-{STOP:08d}":
            shutil.rmtree(path)
    return config


def own_loop(directory: Path) -> Config:
    return with_dropout(directory, "plain", "own").override(engine="fsdp", sharding="no_shard")


@pytest.fixture(scope="module")
def runs(files: Path) -> dict[str, launch.Run]:
    """Start the runs that tests share in two launches, resume some of them in a third, and return all by name."""
    one = [equivalence.reference(files, case) for case in ("gpt2", "qwen2", "bloom", "untied")]
    one = [config.override(name=f"hf-{config.run.name}") for config in one]
    one += [trained(files, *each, 1) for each in EQUAL[1]]
    two = [trained(files, *each, 2) for each in EQUAL[2]] + [own_loop(files)]
    two += [with_dropout(files, file, "uninterrupted") for file in INTERRUPTED]
    done = {run.config.run.name: run for configs in (one, two) for run in launch.run_all(configs)}
    resumed = launch.run_all([interrupted(done[f"hf-uninterrupted.{file}"], file) for file in INTERRUPTED])
    return done | {run.config.run.name: run for run in resumed}


@pytest.mark.parametrize(
    ("ranks", "case", "variant"), [(ranks, *each) for ranks, listed in EQUAL.items() for each in listed]
)
def test_losses_match_our_own_loop(runs, ranks, case, variant):
    run, reference = runs[f"hf-{case}.{variant}.{ranks}"], runs[f"hf-{case}.reference"]
    assert len(run.rows) == small_runs.STEPS
    for row, expected in zip(run.rows, reference.rows, strict=True):
        assert all(row[name] == expected[name] for name in ("step", "epoch", "tokens", "lr"))
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert_same_states(run, reference, 1e-6, weights_alone=run.config.engine.shard_at_load)
    for name in ("eval_loss_before", "eval_loss"):
        assert run.result[name] == (reference.result[name] and pytest.approx(reference.result[name], rel=1e-6))
    assert run.result["num_parameters"] == reference.result["num_parameters"]


def assert_same_states(
    run: launch.Run, reference: launch.Run, tolerance: float, *, weights_alone: bool = False
) -> None:
    """Compare full parameters and moments, as an export or a report would read them."""
    one, other = (checkpoint.open_full(checkpoint.latest(each.directory)) for each in (run, reference))
    assert one.names == other.names and one.trained == other.trained
    for name in one.names:
        assert torch.allclose(one.parameter(name), other.parameter(name), rtol=tolerance, atol=tolerance)
    for name in () if weights_alone else one.trained:
        assert one.adam_step(name) == other.adam_step(name)
        for moment in checkpoint.MOMENTS:
            assert torch.allclose(one.moment(name, moment), other.moment(name, moment), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("file", INTERRUPTED)
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(runs, file):
    uninterrupted, interrupted = runs[f"hf-uninterrupted.{file}"], runs[f"hf-interrupted.{file}"]
    assert interrupted.result["resumed_from"] == STOP and uninterrupted.result["resumed_from"] is None
    rows, expected = ([{**row, "seconds": 0} for row in run.rows] for run in (interrupted, uninterrupted))
    assert rows == expected and len(rows) == END
    assert_same_states(interrupted, uninterrupted, 0.0)
    for name in ("eval_loss_before", "eval_losses", "eval_loss"):
        assert interrupted.result[name] == uninterrupted.result[name]
    assert [(each["epoch"], each["step"]) for each in uninterrupted.result["eval_losses"]] == [(0, 0), (1, 5)]


def test_dropout_draws_the_numbers_of_our_own_loop(runs):
    losses = [[row["loss"] for row in runs[name].rows] for name in ("hf-uninterrupted.plain", "hf-own.plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    evaluated = [
        [each["loss"] for each in runs[n].result["eval_losses"]] for n in ("hf-uninterrupted.plain", "hf-own.plain")
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-6) and len(evaluated[0]) == 2


def test_the_result_shows_the_value_of_every_auto(runs):
    result = runs["hf-gpt2.zero3.2"].result
    assert result["deepspeed_auto"] == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": equivalence.CASES["gpt2"]["gradient_clipping"],
        "zero_optimization.reduce_bucket_size": HIDDEN**2,
        "zero_optimization.stage3_param_persistence_threshold": 10 * HIDDEN,
    }
    assert result["deepspeed_config"]["zero_optimization"]["stage"] == 3
    assert runs["hf-qwen2.plain.2"].result["deepspeed_config"] is None


@pytest.mark.parametrize(("name", "shares"), [("hf-qwen2.load.2", 2), ("hf-gpt2.load-accumulated.2", 1)])
def test_each_rank_holds_a_share_of_a_model_sharded_at_load(runs, name, shares):
    """transformers gathers and reduces a tied weight once per name, and keeps full gradients while it accumulates."""
    num_parameters, tied = runs[name].result["num_parameters"], VOCABULARY * HIDDEN
    for rank in runs[name].result["ranks"]:
        held = rank["measured"]["state_bytes"]
        assert (held["parameters"], held["optimizer"]) == (4 * num_parameters // 2, 8 * num_parameters // 2)
        assert held["gradients"] == 4 * (num_parameters + tied) // shares


def test_the_command_says_that_a_stopped_run_sharded_at_load_ends_here(runs):
    run = runs["hf-qwen2.load.2"]
    said = summary(dataclasses.replace(run, result={**run.result, "status": "stopped"}))
    assert "trainer, shard_at_load=True, fp32" in said
    assert "its weights are saved, and it cannot be resumed" in said and "same command again" not in said


def test_a_model_sharded_at_load_is_exported_and_never_resumed(runs, tmp_path):
    for name in ("hf-gpt2.load-accumulated.2", "hf-bloom.load.2"):
        saved = checkpoint.latest(runs[name].directory)
        full = checkpoint.open_full(saved)
        for directory in (checkpoint.export(saved, tmp_path / name), *saved.glob("engine/checkpoint-*")):
            loaded = AutoModelForCausalLM.from_pretrained(directory)
            assert all(parameter.equal(full.parameter(name)) for name, parameter in loaded.named_parameters())
    config = runs["hf-qwen2.load.2"].config
    for again in (config, config.override(shard_at_load=False)):
        with pytest.raises(
            ConfigError, match=r"sharded at load.*optimizer state cannot be checkpointed.*tutorial_lib export"
        ):
            launch.run(again)
    with pytest.raises(ConfigError, match="has a checkpoint, but shard_at_load=True cannot resume"):
        launch.run(runs["hf-qwen2.plain.2"].config.override(shard_at_load=True))


def test_ranks_that_share_parameters_answer_an_odd_number_of_questions(files, tmp_path):
    """Each rank answers some of the questions, in lockstep with the other, and all answers are scored."""
    questions = {"model": "embedded/bloom", "dataset": "embedded/qa", "seq_length": 96, "max_eval_examples": 5}
    flat = questions | {"engine": "trainer", "dp": 2, "evaluate": True, "score_answers": True, "learning_rate": 4e-3}
    variants: dict[str, dict[str, Any]] = {"zero3": {"deepspeed": "zero3"}, "load": {"shard_at_load": True}}
    configs = [small_runs.config(files, name=f"hf-answers.{name}", **flat, **each) for name, each in variants.items()]
    for run in launch.run_all(configs):
        exported = checkpoint.export(checkpoint.latest(run.directory), tmp_path / run.config.run.name)
        score = evaluate_answers(str(exported), max_examples=5, seq_length=96).score
        assert (run.result["eval_answers"]["f1"], run.result["eval_answers"]["num_questions"]) == (score.f1, 5)
        assert score.f1 > 0


def test_sigterm_saves_and_the_same_command_resumes(files, runs):
    config = with_dropout(files, "zero3", "signalled").override(steps=400, schedule="constant", checkpoint_every=2)
    directory = RunDirectory(config.directory)
    striker = interrupt_when(lambda: any(row["step"] >= 3 for row in directory.rows()), number=signal.SIGTERM)
    code, result = main(train_command(config)[1:]), directory.result()
    striker.join()
    assert (code, result["status"], result["stopped_by"]) == (75, "stopped", "request")  # passed on by the launcher
    step = result["step"]
    assert checkpoint.latest(directory).name == result["checkpoint"] == f"step-{step:08d}"
    run = launch.run(config.override(steps=step + 2))
    assert (run.result["status"], run.result["resumed_from"]) == ("completed", step)
    assert [row["step"] for row in run.rows] == list(range(1, step + 3))
    assert all(row["epoch"] == (row["step"] - 1) // 5 for row in run.rows)
