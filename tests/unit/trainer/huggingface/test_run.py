"""Checkpoints of the Hugging Face Trainer, which are hashed and named like all others, but read only by the Trainer."""

import json
from functools import cached_property

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from tests.support.damaged_files import flip_a_bit
from tests.support.models import mixture_model
from tests.support.torch_runs import STEPS, config, names, rows_without_seconds, steps
from tutorial_lib import checkpoint, launch, trainer
from tutorial_lib.cli import main
from tutorial_lib.cli.train import summary
from tutorial_lib.config import ConfigError
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer.answers import evaluate_answers
from tutorial_lib.trainer.huggingface.run import check_accelerator


def trained(storage, model, **flat):
    return config(storage, model=model, engine="trainer", **flat)


@pytest.fixture(scope="module")
def full_run(model, tmp_path_factory):
    """Train without a stop, evaluate every two steps, and keep the last two checkpoints and the best."""
    flat = {"evaluate": True, "evaluate_every": "2", "max_eval_examples": 6, "checkpoint_every": 2}
    return launch.run(trained(tmp_path_factory.mktemp("full_run"), model, keep_last=2, keep_best=True, **flat))


def test_losses_match_plain_torch(full_run, uninterrupted):
    assert len(full_run.rows) == STEPS
    for row, expected in zip(rows_without_seconds(full_run), rows_without_seconds(uninterrupted), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_evaluation_is_listed_by_step_and_decides_what_is_kept(full_run):
    losses = full_run.result["eval_losses"]
    assert [(each["step"], each["epoch"]) for each in losses] == [(step, step / 3) for step in (0, 2, 4, 6)]
    assert losses[0]["loss"] == full_run.result["eval_loss_before"]
    saved = {each["step"]: each["loss"] for each in losses[1:]} | {STEPS: full_run.result["eval_loss"]}
    best = min(saved, key=saved.__getitem__)
    assert names(full_run.directory) == steps(*sorted({6, STEPS, best}))


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_as_if_nothing_had_happened(full_run, model, tmp_path):
    flat = {"evaluate": True, "evaluate_every": "2", "max_eval_examples": 6, "checkpoint_every": 2}
    interrupted = trained(tmp_path, model, stop_after=5, **flat)
    launch.run(interrupted)
    run = RunDirectory(interrupted.directory)
    assert names(run) == steps(2, 4, 5)
    flip_a_bit(checkpoint.directory_of(run, 5) / "engine/checkpoint-5/optimizer.pt")
    resumed = launch.run(interrupted.override(stop_after=None))
    assert resumed.result["resumed_from"] == 4
    assert [left["checkpoint"] for left in resumed.result["left_out"]] == steps(5)
    assert rows_without_seconds(resumed) == rows_without_seconds(full_run)
    for name in ("eval_loss_before", "eval_losses", "eval_loss"):
        assert resumed.result[name] == full_run.result[name]
    exports = [checkpoint.open_full(checkpoint.latest(each.directory)) for each in (resumed, full_run)]
    assert all(exports[0].parameter(name).equal(exports[1].parameter(name)) for name in exports[0].names)


def test_the_same_command_after_the_end_evaluates_and_trains_nothing(full_run):
    rows, saved = full_run.directory.rows(), names(full_run.directory)
    again = launch.run(full_run.config)
    assert (again.result["status"], again.result["step"], again.result["resumed_from"]) == ("completed", STEPS, STEPS)
    assert again.result["eval_loss"] == full_run.result["eval_loss"]
    assert (full_run.directory.rows(), names(full_run.directory)) == (rows, saved)
    idle = launch.run(full_run.config.override(evaluate=False, evaluate_every=None, keep_best=False, stop_after=STEPS))
    assert (idle.result["status"], full_run.directory.rows()) == ("completed", rows)


def test_an_export_loads_and_a_report_names_every_file(full_run, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.export(checkpoint.latest(full_run.directory), tmp_path / "x")
    )
    full = checkpoint.open_full(checkpoint.latest(full_run.directory))
    assert all(parameter.equal(full.parameter(name)) for name, parameter in model.named_parameters())
    assert main(["inspect", str(checkpoint.latest(full_run.directory))]) == 0
    shown = capsys.readouterr().out
    assert "engine=trainer" in shown and "engine/checkpoint-7/trainer_state.json" in shown


def test_experts_that_are_stored_one_by_one_survive_a_resume_and_an_export(tmp_path):
    mixture_model(tmp_path / "model")
    settings = trained(tmp_path, str(tmp_path / "model"), steps=3)
    whole = launch.run(settings)
    launch.run(settings.override(name="stopped", stop_after=2))
    resumed = launch.run(settings.override(name="stopped"))
    assert rows_without_seconds(resumed) == rows_without_seconds(whole)
    one, other = (
        AutoModelForCausalLM.from_pretrained(checkpoint.export(checkpoint.latest(run.directory), tmp_path / name))
        for name, run in (("one", whole), ("other", resumed))
    )
    assert all(tensor.equal(other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_a_mixture_that_was_saved_expert_by_expert_is_not_resumed(tmp_path, monkeypatch):
    """transformers would log a warning, and train the experts that the run started from."""
    mixture_model(tmp_path / "model")
    settings = trained(tmp_path, str(tmp_path / "model"), steps=3)
    with monkeypatch.context() as patched:
        patched.setattr("tutorial_lib.trainer.huggingface.trainer.partial", lambda save, **_: save)
        launch.run(settings.override(stop_after=2))
    with pytest.raises(checkpoint.CheckpointError, match=r"no place for, such as model\.layers\.0\..*start a new run"):
        launch.run(settings)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"engine": "torch"}, "engine was 'trainer', now 'torch'"),
        ({"deepspeed": "zero1"}, "deepspeed was None, now 'zero1'"),
        ({"dp": 2, "launcher": "local"}, "dp was 1, now 2"),
    ],
)
def test_a_different_shape_is_refused(full_run, flat, message):
    with pytest.raises(ConfigError, match=f"{message}.*The Hugging Face Trainer reads only its own checkpoints"):
        launch.run(full_run.config.override(**flat))
    with pytest.raises(ConfigError, match=r"cannot be reshaped\. Export the weights instead"):
        launch.reshape(checkpoint.latest(full_run.directory), name="other", **flat)


def test_a_checkpoint_of_another_engine_is_refused(uninterrupted):
    with pytest.raises(ConfigError, match="engine was 'torch', now 'trainer'"):
        launch.run(uninterrupted.config.override(engine="trainer"))


def test_a_run_that_diverges_stops_and_names_the_newest_checkpoint(model, tmp_path):
    settings = trained(tmp_path, model, checkpoint_every=1, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(trainer.NonFiniteLoss, match=r"At step 2 the .* is nan.*newest checkpoint is .*step-00000001"):
        launch.run(settings)
    assert len(RunDirectory(settings.directory).rows()) == 1


def test_a_stop_request_is_heeded_between_two_steps(model, tmp_path):
    settings = trained(tmp_path, model, checkpoint_every=1)

    def stop(path, row):
        if row["step"] == 2:
            RunDirectory(settings.directory).stop_file.write_text("")

    RunDirectory(settings.directory).create()
    result = trainer.train(settings, on_checkpoint=stop)
    assert (result.status, result.stopped_by, result.step) == ("stopped", "request", 3)


def test_a_launch_says_that_a_model_sharded_at_load_cannot_be_resumed(model, tmp_path, caplog):
    launch.preflight(trained(tmp_path, model, dp=2, launcher="local", shard_at_load=True))
    assert "this run cannot be resumed" in caplog.text and "Resuming is not supported for models" in caplog.text


def test_a_model_sharded_at_load_stays_off_a_gpu_that_the_run_is_not_to_use(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"puts the model on the cuda device.*train on cpu.*CUDA_VISIBLE_DEVICES=''"):
        check_accelerator(torch.device("cpu"))
    check_accelerator(torch.device("cuda"))


def test_a_cuda_build_without_a_gpu_does_not_count_as_a_gpu(monkeypatch):
    def built_for_cuda(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    check_accelerator(torch.device("cpu"))


def test_runs_that_share_a_process_do_not_disturb_each_other(full_run, model, tmp_path):
    """DeepSpeed leaves traces in global variables and in the environment."""
    sharded = launch.run(trained(tmp_path, model, name="sharded", deepspeed="zero3"))
    plain = launch.run(trained(tmp_path, model, name="plain"))
    for run in (sharded, plain):
        assert [row["loss"] for row in run.rows] == pytest.approx([row["loss"] for row in full_run.rows], rel=1e-6)
    assert rows_without_seconds(plain) == rows_without_seconds(full_run)


def test_on_questions_a_plain_command_trains_on_the_workshops_subset_and_says_so(model, tmp_path, capsys, caplog):
    shape = ["--engine", "trainer", "--dp", "1", "--launcher", "none", "--seq-length", "96", "--steps", "1"]
    command = ["train", *shape, "--model", model, "--dataset", "embedded/qa", "--storage", str(tmp_path)]
    assert main([*command, "--name", "subset"]) == 0
    run = RunDirectory(tmp_path / "subset")
    recorded = json.loads(run.config_file.read_text())
    assert (recorded["max_examples"], recorded["max_eval_examples"]) == (500, 50)
    assert {use: split["num_rows"] for use, split in run.result()["data"].items()} == {"train": 500, "eval": 50}
    shown = capsys.readouterr().out
    assert "the first 500; for all, write --max-examples all" in shown and "the first 50; for all" in shown
    assert "This run reads the first 500 of the 2755 rows of 'train' and the first 50 of the 350" in caplog.text
    assert main([*command, "--name", "chosen", "--max-examples", "8", "--max-eval-examples", "all"]) == 0
    data = RunDirectory(tmp_path / "chosen").result()["data"]
    assert {use: split["num_rows"] for use, split in data.items()} == {"train": 8, "eval": 350}
    assert "the first" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Train a run that answers five questions at each evaluation, and keep its best checkpoint."""
    flat = {"evaluate": True, "evaluate_every": "1", "max_eval_examples": 5, "checkpoint_every": 1, "keep_best": True}
    flat |= {"dataset": "embedded/qa", "score_answers": True, "steps": 2, "seq_length": 96, "learning_rate": 2e-3}
    return launch.run(trained(tmp_path_factory.mktemp("answered"), "embedded/bloom", **flat))


def test_exact_match_and_f1_stand_beside_the_evaluation_loss(answered, tmp_path):
    """The exported weights are loaded, and answer the same questions, without the Trainer."""
    exported = checkpoint.export(checkpoint.latest(answered.directory), tmp_path / "exported")
    own, before = (evaluate_answers(str(each), max_examples=5, seq_length=96) for each in (exported, "embedded/bloom"))
    assert answered.result["eval_answers"] == {
        "exact_match": own.score.exact_match, "f1": own.score.f1, "num_questions": 5, "num_cut": own.num_cut,
    }  # fmt: skip
    first, _, last = answered.result["eval_losses"]
    assert (first["f1"], last["f1"]) == (before.score.f1, own.score.f1) and own.score.f1 != before.score.f1
    shown = summary(answered)
    assert f"exact match 0.0 %, F1 {own.score.f1:.1f} % on 5 questions, {own.num_cut} of them without" in shown
    assert f"over all tokens; exact match 0.0 %, F1 {before.score.f1:.1f} %)" in shown


def test_the_same_command_after_the_end_still_reports_the_answers(answered):
    again = launch.run(answered.config)
    assert again.result["resumed_from"] == 2 and again.result["eval_answers"] == answered.result["eval_answers"]


def test_answers_are_scored_only_where_there_are_questions(model, tmp_path):
    settings = trained(tmp_path, model, evaluate=True, score_answers=True)
    with pytest.raises(
        ConfigError, match=r"has no column answers, context, question\. Choose a data set with questions"
    ):
        launch.preflight(settings)
    with pytest.raises(ConfigError, match="score_answers=True belongs to an evaluation: write evaluate=True"):
        settings.override(evaluate=False)
    with pytest.raises(ConfigError, match="score_answers=True would have no effect: it needs engine='trainer'"):
        config(tmp_path, score_answers=True, evaluate=True)


def test_a_run_of_one_rank_uses_one_gpu_of_several(full_run, model, tmp_path, monkeypatch):
    """transformers counts the GPUs that it sees, and would split each batch over all of them."""
    set_up = TrainingArguments.__dict__["_setup_devices"].func

    @cached_property
    def on_two_gpus(args):
        device = set_up(args)
        args._n_gpu = 2
        return device

    on_two_gpus.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", on_two_gpus)
    alone = launch.run(trained(tmp_path, model, stop_after=2))
    assert rows_without_seconds(alone) == rows_without_seconds(full_run)[:2]
