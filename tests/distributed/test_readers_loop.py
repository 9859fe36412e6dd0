"""A reader's own loop, built from the package's parts: it trains like the trainer, and each resumes the other's runs.

The loop is in ``notebooks/scripts/train_zero.py``. ``test_ray.py`` gives it to Ray's own ``TorchTrainer``.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.distributed.cases import small_runs
from tests.distributed.faults.checks import assert_same_states
from tests.support.commands import train_command
from tests.support.models import DROPOUT, MODELS, small_model
from tutorial_lib import checkpoint, launch
from tutorial_lib.checkpoint import manifest
from tutorial_lib.config import ConfigError
from tutorial_lib.lab.scripts import train_zero
from tutorial_lib.records import RunDirectory

STOP, END = 3, 8
WAYS = {
    "torch": {"engine": "torch", "dp": 1},
    "zero0": {"zero_stage": 0},
    "zero3": {"zero_stage": 3, "micro_batch": 1},
    "fsdp": {"engine": "fsdp"},
    "fsdp-tp": {"engine": "fsdp", "dp": 1, "tp": 2},
    "zero2-chunked": {"zero_stage": 2, "loss_chunks": 4},
    "zero3-chunked": {"zero_stage": 3, "loss_chunks": 4, "micro_batch": 1},
    "fsdp-chunked": {"engine": "fsdp", "loss_chunks": 4, "micro_batch": 2},
    "ddp-chunked": {"engine": "fsdp", "sharding": "no_shard", "loss_chunks": 4},
}
"""Ways to train on one rank, or on two ranks that share the work, with and without a chunked loss."""

IN_BF16 = {
    "zero3-bf16": {"zero_stage": 3, "precision": "bf16"},
    "zero3-bf16-chunked": {"zero_stage": 3, "precision": "bf16", "loss_chunks": 4},
    "fsdp-bf16": {"engine": "fsdp", "precision": "bf16"},
    "fsdp-bf16-chunked": {"engine": "fsdp", "precision": "bf16", "loss_chunks": 4},
}
"""Ways to train in bf16, where a chunked loss is rounded per token."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("own-loop")
    small_model("gpt2", directory / "gpt2", **MODELS["gpt2"])
    small_model("gpt2", directory / "gpt2-dropout", **MODELS["gpt2"], **DROPOUT["gpt2"])
    return directory


def config(directory, name, **changes):
    flat = {"model": "gpt2", "max_examples": 40, "steps": END, "dp": 2, "warmup_steps": 2, "zero_stage": 2}
    if changes.get("engine", "deepspeed") != "deepspeed":
        del flat["zero_stage"]
    return small_runs.config(directory, **(flat | {"name": name} | changes))


def resumable(directory, name, **changes):
    """Return a run with dropout, which different random numbers would change."""
    return config(directory, name, model="gpt2-dropout", zero_stage=1, schedule="cosine", **changes)


def train_with_loop(configs):
    """Train with the loop in warm processes, and return the losses of each start."""
    launch.run_all(configs, worker="tests.distributed.workers.own_loop")
    return [json.loads((each.directory / "losses.json").read_text()) for each in configs]


def losses_of(run, first=1):
    return [row["loss"] for row in run.rows if row["step"] >= first]


def run_torchrun(shell, *program):
    """Run a program on two ranks, and return its exit code and its text on standard error."""
    shell.start(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, program)])
    return shell.exit_code(), (shell.scratch / "stderr").read_text()


@pytest.fixture(scope="module")
def reference(directory):
    """Train with the package's trainer in one process of plain PyTorch."""
    run = launch.run(config(directory, "reference", engine="torch", dp=1, launcher="none"))
    return losses_of(run)


@pytest.fixture(scope="module")
def uninterrupted(directory):
    """Train with the package's trainer on two ranks, uninterrupted."""
    return launch.run(resumable(directory, "uninterrupted"))


@pytest.fixture(scope="module")
def begun(directory):
    """Train with the loop in each way, in a run that stops and in one that saves often, and return losses by name."""
    ways = [config(directory, name, **flat) for name, flat in (WAYS | IN_BF16).items()]
    stopped = resumable(directory, "begun", stop_after=STOP)
    background = resumable(directory, "background", checkpoint_every=1, async_save=True, keep_last=2)
    losses = {}
    for num_ranks in (1, 2):
        runs = [each for each in (*ways, stopped, background) if each.parallel.world_size == num_ranks]
        losses |= zip([each.run.name for each in runs], train_with_loop(runs), strict=True)
    shutil.copytree(stopped.directory, directory / "runs" / "handed-on")
    return losses


@pytest.mark.parametrize("way", WAYS)
def test_the_loop_trains_as_one_process_does(begun, reference, way):
    assert begun[way] == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("way", ["zero3-bf16", "fsdp-bf16"])
def test_in_bf16_a_chunked_loss_matches_to_bf16_rounding(begun, way):
    assert begun[f"{way}-chunked"] == pytest.approx(begun[way], rel=2e-3)


def test_the_script_trains_under_torchrun_and_the_command_line_takes_its_run_over(directory, shell, reference):
    stopped = config(directory, "torchrun", launcher="none", stop_after=STOP)
    (directory / "torchrun.json").write_text(stopped.to_json())
    code, said = run_torchrun(shell, train_zero.__file__, directory / "torchrun.json")
    assert code == 0, said
    shown = (shell.scratch / "stdout").read_text()
    losses = [float(loss) for loss in re.findall(r"^step +\d+  loss (\S+)$", shown, re.MULTILINE)]
    assert losses == pytest.approx(reference[:STOP], rel=1e-6)
    code, said = run_torchrun(shell, "-m", *train_command(stopped.override(stop_after=None)))
    assert code == 0, said
    result = shell.result()
    assert (result["status"], result["resumed_from"]) == ("completed", STOP)
    rows = RunDirectory(stopped.directory).rows()
    assert [row["step"] for row in rows] == list(range(STOP + 1, END + 1))
    assert [row["loss"] for row in rows] == pytest.approx(reference[STOP:], rel=1e-6)


def test_the_loop_resumes_bit_for_bit_after_a_rank_is_killed(directory, shell, uninterrupted):
    """The kill comes two steps after a checkpoint. torchrun then ends the other rank."""
    killed = resumable(directory, "killed", launcher="none", checkpoint_every=STOP)
    (directory / "killed.json").write_text(killed.to_json())
    loop = ["-m", "tests.distributed.workers.killed_loop", directory / "killed.json"]
    run, expected = RunDirectory(killed.directory), losses_of(uninterrupted)
    code, said = run_torchrun(shell, *loop, STOP + 2)
    assert code == 1 and re.search(r"rank +: 1 .*\n +exitcode +: -9 ", said), said
    before = run.rows()
    assert [row["loss"] for row in before] == expected[: len(before)] and len(before) > STOP, "it trained on"
    assert checkpoint.latest(run) == checkpoint.directory_of(run, STOP)
    code, said = run_torchrun(shell, *loop)
    assert code == 0, said
    assert [(row["step"], row["loss"]) for row in run.rows()[len(before) :]] == [*enumerate(expected, 1)][STOP:]
    assert_same_states(run, uninterrupted.directory)


def test_the_loop_resumes_bit_for_bit(directory, begun, uninterrupted):
    (losses,) = train_with_loop([resumable(directory, "begun")])
    assert begun["begun"] + losses == losses_of(uninterrupted)
    assert_same_states(RunDirectory(directory / "runs" / "begun"), uninterrupted.directory)


def test_the_trainer_resumes_from_the_loops_checkpoint(directory, begun, uninterrupted):
    run = launch.run(resumable(directory, "handed-on"))
    assert run.result["resumed_from"] == STOP
    assert losses_of(run) == losses_of(uninterrupted, STOP + 1)
    assert [row["lr"] for row in run.rows] == [row["lr"] for row in uninterrupted.rows[STOP:]]


def test_the_loop_resumes_from_the_trainers_checkpoint(directory, uninterrupted):
    launch.run(resumable(directory, "taken-over", stop_after=STOP))
    (losses,) = train_with_loop([resumable(directory, "taken-over")])
    assert losses == losses_of(uninterrupted, STOP + 1)


def test_both_checkpoints_have_the_same_files_and_state(directory, begun, uninterrupted):
    ours, theirs = (
        checkpoint.directory_of(RunDirectory(directory / "runs" / name), END)
        for name in ("background", "uninterrupted")
    )
    assert sorted(manifest.read_manifest(ours)) == sorted(manifest.read_manifest(theirs))
    state, expected = manifest.read_trainer_state(ours), manifest.read_trainer_state(theirs)
    for part in ("step", "scheduler", "identity", "world_size", "format"):
        assert state[part] == expected[part], part


def test_files_are_written_in_the_background_and_old_checkpoints_are_deleted(directory, begun, uninterrupted):
    assert begun["background"] == losses_of(uninterrupted)
    kept = RunDirectory(directory / "runs" / "background").checkpoints.iterdir()
    assert sorted(path.name for path in kept) == [f"step-{step:08d}" for step in (END - 1, END)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"keep_best": True, "evaluate": True},
            r"nothing evaluates: pass an evaluation function to CheckpointManager\(\.\.\., evaluate=\.\.\.\)",
        ),
        ({"steps": None, "epochs": 1, "warmup_steps": 9}, "warmup_steps=9 is longer than the whole run of 5"),
        ({"name": "uninterrupted", "seed": 1}, "seed was 0, now 1"),
    ],
)
def test_settings_that_the_loop_would_ignore_are_refused_before_training(directory, uninterrupted, changes, message):
    settings = {"engine": "torch", "dp": 1, "launcher": "none", "name": "refused", "max_examples": 40, **changes}
    with pytest.raises(ConfigError, match=message):
        train_zero.train_loop({"config": small_runs.config(directory, **{"model": "gpt2", **settings}).to_json()})
