"""Launch: refusals before a process starts, and the exit codes that scripts rely on.

Runs that start here have one rank, in this process, except where ranks only fail. ``tests/distributed`` starts runs in
processes of their own.
"""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch

from tests.support.bench_records import leave_run
from tests.unit.arguments import changed
from tutorial_lib import launch
from tutorial_lib.cli import main
from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch import runs
from tutorial_lib.records import RunDirectory

ONE_PROCESS = ["--engine", "torch", "--dp", "1", "--launcher", "none"]
SMALL = ["--steps", "3", "--global-batch", "2", "--seq-length", "32", "--max-examples", "8", "--no-evaluate"]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that is asked for")


@pytest.fixture
def storage(tmp_path):
    return ["--storage", str(tmp_path / "runs")]


@pytest.fixture
def places(tmp_path):
    """Return paths that are each wrong in one way, for the arguments below."""
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.json").write_text('{"zero_optimization": {"stage": 2},}')
    (tmp_path / "blank").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "blank" / f"{split}.jsonl").write_text('{"text": "  "}\n' * 8)
    return {name: str(tmp_path / name) for name in ("file", "broken.json", "blank", "missing")}


BAD = {
    "a run name with a separator": (["--name", "a/b"], "cannot be a directory name. Use only letters, digits"),
    "a run name that leads out": (["--name", ".."], "cannot be a directory name"),
    "a model that is not there": (["--model", "no-such-model"], "embedded model: embedded/gpt2, embedded/qwen2"),
    "an embedded model misspelt": (["--model", "embedded/gtp2"], "Write one of: embedded/gpt2, embedded/qwen2"),
    "a model directory that is not there": (["--model", "{missing}"], "neither a local directory nor a hub name"),
    "a model without weights": (["--model", "embedded/gpt2-small"], "Write random_init=True"),
    "a data set that is not there": (["--dataset", "no-such-data"], "embedded/news, embedded/articles, embedded/qa"),
    "an embedded data set misspelt": (["--dataset", "embedded/new"], "Write one of: embedded/news"),
    "a split that is not there": (["--train-split", "tarin"], "has no split 'tarin'"),
    "no row left after filtering": (["--dataset", "{blank}"], "all 8 are blank"),
    "too few rows for a step": (["--global-batch", "16"], "has 8 rows, fewer than global_batch=16"),
    "sequences longer than the model": (["--seq-length", "513"], "Write seq_length=512 or less"),
    "a batch that cannot be split": (["--micro-batch", "4", "--global-batch", "6"], "one of [1, 2, 3, 6]"),
    "a global batch that ranks cannot share": (
        ["--engine", "deepspeed", "--dp", "2", "--global-batch", "7"],
        "Write global_batch=6 or 8",
    ),
    "a stage that does not exist": (["--zero-stage", "4"], "zero_stage is 4; the largest possible value is 3"),
    "parameter offload below stage 3": (
        ["--engine", "deepspeed", "--offload", "all", "--zero-stage", "2"],
        "Write offload='optimizer', or zero_stage=3",
    ),
    "heads that cannot be shared out": (
        ["--engine", "deepspeed", "--model", "embedded/qwen2", "--tp", "8"],
        "tp=8 does not divide this qwen2 model's 4 key-value heads. Write tp as one of [1, 2, 4]",
    ),
    "a model that AutoTP does not split": (
        ["--engine", "deepspeed", "--tp", "2"],
        "embedded/qwen2, embedded/bloom, or another family",
    ),
    "the reference with split layers": (["--tp", "2"], "Write dp=1, tp=1, or engine='deepspeed'"),
    "fp16 on a CPU": (["--precision", "fp16"], "write precision='bf16' or 'fp32'"),
    "the reference on two ranks": (["--dp", "2"], "Write dp=1, tp=1, or engine='deepspeed'"),
    "ranks that nobody has started": (["--engine", "deepspeed", "--dp", "2"], "torch.distributed.run"),
    "storage below a file": (["--storage", "{file}/runs"], "Name a directory that every rank can write to"),
    "a JSON file that does not parse": (
        ["--engine", "deepspeed", "--deepspeed", "{broken.json}"],
        "broken.json is not valid JSON",
    ),
    "a JSON file that is not there": (["--engine", "deepspeed", "--deepspeed", "zero9"], "or one of: zero0"),
    "a profile that does not exist": (["--profile", "tpu"], "Write one of: cpu, gpu, cluster"),
    "a stop beyond the end": (["--stop-after", "4"], "past the last step, steps=3"),
    "nothing that is trained": (["--freeze", "*"], "leaves no parameter to train"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_usage_exits_with_2_and_says_what_to_write(storage, places, capsys, what):
    given, message = BAD[what]
    given = [re.sub(r"\{(.+)\}", lambda found: places[found[1]], argument) for argument in given]
    assert main(["train", *changed([*ONE_PROCESS, *SMALL, *storage], given)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "error: " in shown.err and "Traceback" not in shown.err
    assert shown.out == ""


@needs_no_gpu
@pytest.mark.parametrize(
    "given", [["--device", "cuda"], ["--profile", "gpu"], ["--profile", "gpu", "--launcher", "local"]]
)
def test_a_gpu_on_a_machine_without_one(storage, capsys, given):
    assert main(["train", *changed([*ONE_PROCESS, *SMALL, *storage, "--precision", "fp32"], given)]) == 2
    assert "this machine has 0. Write profile='cpu'" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_more_processes_than_fit_into_memory(storage, monkeypatch, launcher):
    monkeypatch.setattr(launch.checks, "available_memory_gb", lambda: 2.0)
    many = Config.create("cpu", storage=storage[1], launcher=launcher, dp=16, global_batch=16)
    with pytest.raises(ConfigError, match=r"16 processes need about 7.2 GB .* 2.0 GB are free .* at most 4,"):
        launch.preflight(many)
    monkeypatch.setattr(launch.checks, "available_memory_gb", lambda: 0.2)
    with pytest.raises(ConfigError, match=r"0.2 GB are free here. Close other programs, or raise the container's"):
        launch.preflight(many.override(dp=1))
    monkeypatch.setattr(launch.checks, "available_memory_gb", lambda: 2.0)
    launch.preflight(many.override(dp=4))


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            "transformer.wte",
            r"no parameter matches 'transformer\.wte'\. Some of .*: transformer\.wte\.weight,",
        ),
        ("nope", r"no parameter matches 'nope'\. Some of .* transformer\.wte\.weight"),
        ("*", "leaves no parameter to train"),
    ],
)
def test_patterns_of_parameters_are_checked_before_a_process_starts(storage, freeze, message):
    with pytest.raises(ConfigError, match=message):
        launch.preflight(Config.create("cpu", storage=storage[1], freeze=(freeze,)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train", "--steps", "many"], "argument --steps: 'many' is not a whole number ("),
        (
            ["train", "--zero-stage", "two"],
            "argument --zero-stage: 'two' is not a whole number (0: nothing partitioned; 1: ",
        ),
        (["train", "--learning-rate", "low"], "argument --learning-rate: 'low' is not a number ("),
        (["train", "--bogus"], "unrecognized arguments: --bogus. See python -m tutorial_lib train --help."),
        (
            ["train", "--learning_rate=1", "--zero_stage", "2"],
            "unrecognized arguments: --learning_rate=1 --zero_stage 2 (did you mean --learning-rate, --zero-stage?). "
            "See python -m tutorial_lib train",
        ),
        (["inspect", "run", "other"], "unrecognized arguments: other. See python -m tutorial_lib inspect --help."),
        (["--json"], "the following arguments are required: COMMAND. See python -m tutorial_lib --help."),
    ],
)
def test_arguments_that_cannot_be_read_exit_with_2_and_one_line(capsys, given, message):
    with pytest.raises(SystemExit) as exit:
        main(given)
    assert exit.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}") and line.endswith("--help.")


def test_a_run_from_the_shell(storage, capsys, monkeypatch):
    """A run that stops exits with 75. The same command completes it and exits with 0. Each prints one JSON object."""
    arguments = ["train", *ONE_PROCESS, *SMALL, *storage, "--json"]
    assert main([*arguments, "--stop-after", "1"]) == 75
    stopped = json.loads(capsys.readouterr().out)
    assert (stopped["status"], stopped["step"], stopped["num_steps"]) == ("stopped", 1, 3)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "left over")
    assert main([*arguments, "--stop-after", "2"]) == 75
    capsys.readouterr()
    assert main(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["status"], done["step"], done["resumed_from"]) == ("completed", 3, 2)


def test_a_damaged_checkpoint_exits_with_1_and_is_named(storage, tmp_path, capsys):
    arguments = ["train", *ONE_PROCESS, *SMALL, *storage]
    assert main([*arguments, "--stop-after", "2"]) == 75
    damaged = tmp_path / "runs" / "run" / "checkpoints" / "step-00000002" / "engine" / "model.pt"
    damaged.write_bytes(b"")
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert f"{damaged} has 0 bytes" in shown and "none of them is intact" in shown


def test_a_skipped_checkpoint_is_reported(storage, tmp_path, capsys):
    arguments = ["train", *ONE_PROCESS, *SMALL, *storage, "--checkpoint-every", "1"]
    assert main([*arguments, "--stop-after", "2"]) == 75
    damaged = tmp_path / "runs" / "run" / "checkpoints" / "step-00000002" / "engine" / "model.pt"
    damaged.write_bytes(b"")
    capsys.readouterr()
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"left out +step-00000002: {damaged} has 0 bytes", shown)
    assert re.search(r"status +completed at step 3 of 3, resumed from 1", shown)


def test_an_export_from_the_shell(storage, tmp_path, capsys):
    run, target = tmp_path / "runs" / "run", tmp_path / "exported"
    assert main(["export", str(run), str(target)]) == 2
    assert "neither a checkpoint nor the directory of a run" in capsys.readouterr().err
    assert main(["train", *ONE_PROCESS, *SMALL, *storage]) == 0
    capsys.readouterr()
    assert main(["export", str(run), str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["export"] == str(target)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in target.iterdir()}
    assert main(["export", str(run), str(target)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_exit_code_reaches_the_shell(tmp_path):
    command = [sys.executable, "-m", "tutorial_lib", "train", "--name", "a/b", "--storage", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: Run name 'a/b'") and ended.stderr.count("\n") == 1


def config(tmp_path, **flat):
    settings = {"engine": "torch", "dp": 1, "launcher": "none", "steps": 3, "global_batch": 2, "seq_length": 32}
    return Config.create("cpu", **(settings | {"max_examples": 8, "evaluate": False, "storage": str(tmp_path)} | flat))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "Two runs have the same name and storage"),
        ({"name": "b", "launcher": "local"}, "'run' and 'b' differ in launcher: start them separately"),
        ({"name": "b", "engine": "deepspeed", "dp": 2}, "need 1 and 2 processes: start them separately"),
    ],
)
def test_runs_that_cannot_share_processes_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        launch.run_all([config(tmp_path), config(tmp_path, **changes)])
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_restarts_are_limited_to_single_runs(tmp_path):
    """With several runs it would be unclear which one failed."""
    runs = [config(tmp_path, name=name, launcher="ray", max_failures=1) for name in ("a", "b")]
    with pytest.raises(ConfigError, match=r"max_failures works with a single run only.*Start them separately"):
        launch.run_all(runs)
    elastic = [run.override(max_failures=0, min_dp=1, checkpoint_every=1) for run in runs]
    with pytest.raises(ConfigError, match=r"min_dp works with a single run only.*Start them separately"):
        launch.run_all(elastic)


def test_several_runs_in_one_start(tmp_path):
    runs = launch.run_all([config(tmp_path, name=name, seed=seed) for seed, name in enumerate(("a", "b"))])
    alone = launch.run(config(tmp_path, name="c", seed=1))
    assert [row["loss"] for row in runs[1].rows] == [row["loss"] for row in alone.rows]
    assert runs[0].rows[0]["loss"] != runs[1].rows[0]["loss"]


def test_rows_are_handed_on_once_and_in_order(tmp_path):
    seen = []
    run = launch.run(config(tmp_path, stop_after=2), on_rows=seen.extend)
    assert seen == run.rows
    run = launch.run(config(tmp_path), on_rows=seen.extend)
    assert seen == run.rows and len(run.rows) == 3


def test_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    launch.run(config(tmp_path, steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return launch.run(config(tmp_path_factory.mktemp("uninterrupted"), steps=5))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_after_the_step_it_came_in_and_saves(uninterrupted, tmp_path, monkeypatch, number):
    from tutorial_lib.engine.single import TorchEngine

    update, steps = TorchEngine.step, []

    def interrupted(self):
        steps.append(None)
        if len(steps) == 2:
            signal.raise_signal(number)
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "step", interrupted)
        if number == signal.SIGINT:
            with pytest.raises(launch.Interrupted, match="run 'run' stopped at step 2 of 5 and was saved") as error:
                launch.run(config(tmp_path, steps=5))
            (run,) = error.value.runs
        else:
            run = launch.run(config(tmp_path, steps=5))
    assert run.result["stopped_by"] == signal.Signals(number).name
    # The request is noticed when the step is done. That step is the last one, and is saved.
    assert (run.result["status"], run.result["step"], run.result["checkpoint"]) == ("stopped", 2, "step-00000002")
    run = launch.run(config(tmp_path, steps=5))
    assert [row["loss"] for row in run.rows] == [row["loss"] for row in uninterrupted.rows]


def test_a_run_that_completes_although_a_signal_came_says_so(tmp_path, monkeypatch):
    def signalled(configs, poll, worker):
        leave_run(configs[0])
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(launch.local, "launch", signalled)
    done = launch.run(config(tmp_path, launcher="local"))
    assert (done.result["status"], done.was_signalled) == ("completed", True)


def test_an_interrupt_while_the_run_directory_is_made_is_answered_like_a_later_one(tmp_path, monkeypatch):
    create = RunDirectory.create

    def interrupted(self):
        create(self)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunDirectory, "create", interrupted)
    with pytest.raises(launch.Interrupted, match="stopped before training started; no step was run"):
        launch.run(config(tmp_path, engine="deepspeed", dp=2, launcher="local"))


def test_an_interrupt_before_there_is_anything_to_save_ends_the_command_with_130(storage, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "preflight", interrupted)
    assert main(["train", *ONE_PROCESS, *SMALL, *storage]) == 130
    assert capsys.readouterr().err.endswith("interrupted: ended at once, without saving\n")


def test_a_stop_request_of_an_earlier_start_is_forgotten(tmp_path):
    run = launch.run(config(tmp_path, stop_after=1))
    run.directory.stop_file.write_text("left by a start that was killed")
    assert launch.run(config(tmp_path)).result["status"] == "completed"


def test_resuming_with_other_settings_is_refused_before_processes_start(tmp_path):
    config_ = config(tmp_path, name="same", dp=1, engine="torch", steps=1)
    launch.run(config_)
    with pytest.raises(ConfigError, match=r"cannot resume with different settings: learning_rate was 0.001, now 0.5"):
        launch.preflight(config_.override(learning_rate=0.5))
    with pytest.raises(ConfigError, match="resume='never' forbids resuming from it"):
        launch.preflight(config_.override(resume="never"))


WORKERS = "tests.unit.launch.workers"


@pytest.mark.parametrize(
    ("worker", "begin", "also"),
    [
        (
            "aborting",
            "Rank 0 ended with exit code -6 and left no traceback: signal 6 (Aborted) ended it. Run the same",
            "Rank 1 failed with RuntimeError: of a peer",
        ),
        (
            "failing_and_aborting",
            "Rank 0 of run 'aborts' failed with ValueError: its own",
            r"Its output: \S+rank-000\.log",
        ),
    ],
)
def test_the_error_of_an_aborted_rank_includes_what_all_ranks_wrote(tmp_path, worker, begin, also):
    config = Config.create("cpu", dp=2, storage=str(tmp_path), name="aborts", launcher="local", steps=1)
    with pytest.raises(launch.WorkerError) as error:
        launch.run_all([config], worker=f"{WORKERS}.{worker}")
    said = str(error.value)
    assert said.startswith(begin)
    assert re.search(also, said)
    assert ("what(): from C++" in said) == (worker == "aborting"), (
        "the end of the output is for ranks that recorded no error"
    )


def test_a_waiting_rank_is_ended_and_not_blamed(tmp_path, monkeypatch):
    """The launcher kills the waiting rank, so this does not take long."""
    monkeypatch.setattr(launch.local, "PEERS_SECONDS", 1)
    config = Config.create("cpu", dp=2, storage=str(tmp_path), name="waiting", launcher="local", steps=1)
    with pytest.raises(launch.WorkerError, match=r"^Rank 0 of run 'waiting' failed with ModuleNotFoundError") as error:
        launch.run_all([config], worker=f"{WORKERS}.waiting")
    assert "killed" not in str(error.value)
