"""Batch scripts as text, and a job followed through answers of ``squeue``. ``tests/cluster`` runs real ones."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tutorial_lib import cli
from tutorial_lib.records import RunDirectory

ON_GPUS = ["slurm", "--nodes", "2", "--gpus-per-node", "4"]
ON_CPUS = ["slurm", "--profile", "cpu", "--nodes", "2", "--ranks-per-node", "2"]


def written(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Return the script, after bash has checked its syntax."""
    assert cli.main(arguments) == cli.DONE
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    return script


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?([^ \n]*)", script, re.MULTILINE))


def test_what_is_asked_for_is_consistent(capsys: pytest.CaptureFixture[str]) -> None:
    script = written(capsys, [*ON_GPUS, "--tp", "2", "--cpus-per-rank", "6"])
    asked = options(script)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "1", "4")
    assert asked["cpus-per-task"] == "24"
    assert "gpus" not in asked
    assert "--nproc-per-node=4" in script
    assert "--profile cluster --launcher none" in script and "--dp 4 --tp 2" in script


def test_the_cpu_script_differs_in_gpu_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    script = written(capsys, [*ON_CPUS, "--cpus-per-rank", "3"])
    assert "gpu" not in script.lower()
    assert options(script)["cpus-per-task"] == "6"


def test_what_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    script = written(capsys, ON_GPUS)
    assert "measure.sampler" in script and "scontrol requeue" in script and "requeue" in options(script)
    less = written(capsys, [*ON_GPUS, "--no-sample-memory", "--no-requeue"])
    assert "measure.sampler" not in less and "scontrol requeue" not in less and "no-requeue" in options(less)


def test_settings_reach_train_as_they_were_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    storage = str(tmp_path / "two words")
    script = written(
        capsys, [*ON_CPUS, "--freeze", "*.h.0.*", "*.wpe.*", "--no-evaluate", "--storage", storage, "--name", "x"]
    )
    command = script[script.index("-m tutorial_lib train") : script.index("export -f")].replace("\\\n", " ")
    words = subprocess.run(
        ["bash", "-c", 'printf "%s\\n" ' + command.strip().rstrip("}")], capture_output=True, text=True
    ).stdout.splitlines()
    assert words[:3] == ["-m", "tutorial_lib", "train"]
    assert words[words.index("--freeze") + 1 :][:2] == ["*.h.0.*", "*.wpe.*"]
    assert "--no-evaluate" in words
    assert words[words.index("--storage") + 1] == storage


def test_an_experiment_by_its_workshop_name(capsys: pytest.CaptureFixture[str]) -> None:
    script = written(capsys, ["slurm", "--experiment", "3ZO-8G4N"])
    assert (options(script)["nodes"], options(script)["gpus-per-node"]) == ("4", "2")
    assert (
        "--dp 8" in script and "--zero-stage 3 --offload all --no-pin-memory" in script and "--name 3ZO-8G4N" in script
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slurm"], "Write --gpus-per-node N, or --experiment NAME"),
        (["slurm", "--ranks-per-node", "2"], "cannot be used with device='cuda'. Write --gpus-per-node"),
        (["slurm", "--profile", "cpu", "--gpus-per-node", "2"], "Write --ranks-per-node"),
        ([*ON_GPUS, "--dp", "4"], "Leave dp out: it follows"),
        ([*ON_GPUS, "--tp", "8"], "a tensor-parallel group would span nodes"),
        ([*ON_GPUS, "--tp", "3"], "Leave dp out|span nodes"),
        ([*ON_GPUS, "--launcher", "ray"], "under SLURM torchrun starts them"),
        ([*ON_GPUS, "--resume", "never"], "write --no-requeue"),
        ([*ON_GPUS, "--time", "soon"], "Write HOURS:MINUTES:SECONDS"),
        ([*ON_GPUS, "--time", "00:02:00"], "which is before it starts"),
        ([*ON_GPUS, "--partition", "a b"], "partition is 'a b'"),
        ([*ON_CPUS, "--device", "tpu"], "device is 'tpu'|Write --ranks-per-node"),
        (["slurm", "--nodes", "0", "--gpus-per-node", "1"], "nodes is 0"),
        (["slurm", "--experiment", "2Z-2G1N", "--nodes", "2"], "Experiment 2Z-2G1N sets --nodes itself"),
        (["slurm", "--experiment", "2Z-2G1N", "--zero-stage", "3"], "sets --zero-stage itself"),
        (["slurm", "--experiment", "2Z-3G2N"], "2 nodes cannot share 3 GPUs evenly"),
    ],
)
def test_what_does_not_go_together_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == cli.BAD_CONFIGURATION
    assert re.search(message, capsys.readouterr().err)


class FakeSlurm:
    """Fake SLURM programs that answer as told."""

    def __init__(self, directory: Path) -> None:
        self.run = RunDirectory(directory / "runs" / "job")
        self.run.create()
        self.log = directory / "slurm-job-7.out"
        self.arguments = [*ON_CPUS, "--name", "job", "--storage", str(directory / "runs"), "--submit"]
        self._programs = directory / "bin"
        self._programs.mkdir()
        self.left = RunDirectory(directory / "left")
        self.left.create()
        self._program("sbatch", f"cat > {directory}/submitted; cp -r {directory}/left/. {directory}/runs/job; echo 7")
        self._program("scancel", f'echo "$*" >> {directory}/cancelled; echo "CANCELLED||" > {directory}/state')
        self._program(
            "squeue",
            f"head -n 1 {directory}/state; [[ $(wc -l < {directory}/state) = 1 ]] || sed -i 1d {directory}/state",
        )
        self.directory = directory

    def _program(self, name: str, text: str) -> None:
        (self._programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self._programs / name).chmod(0o755)

    def answer(self, *states: str, **result: object) -> None:
        """Let ``squeue`` answer these, one after the other, and let the job leave a result."""
        (self.directory / "state").write_text("\n".join(states) + "\n")
        if result:
            complete = {"train_loss": 1.0, "eval_loss": None, "eval_loss_before": None, "eval_losses": [],
                     "step": 1, "num_steps": 2,
                     "resumed_from": None, "reshaped_from": None, "left_out": [], "restarts": [], "data": {},
                     "tokens_per_second": 1.0, "ranks": [], "checkpoint": "step-00000001"}  # fmt: skip
            self.left.result_file.write_text(json.dumps(complete | result))

    def refuse(self, words: str) -> None:
        self._program("sbatch", f"echo '{words}' >&2; exit 1")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tutorial_lib.launch.slurm.job.ASK_SECONDS", 0.1)
    return fake


RUNNING = ["PENDING|Priority|", "RUNNING|None|node[1-2]", "RUNNING|None|node[1-2]", "COMPLETING|None|node[1-2]"]


def test_a_job_that_completes(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answer(*RUNNING, "COMPLETED|None|node[1-2]", status="completed")
    assert cli.main(slurm.arguments) == cli.DONE
    shown = capsys.readouterr()
    assert "completed at step 1" in shown.out
    assert "job 7: PENDING (Priority)\n" in shown.err and "job 7: RUNNING on node[1-2]\n" in shown.err
    assert (slurm.directory / "submitted").read_text().startswith("#!/usr/bin/env bash\n# Run job:")


def test_a_requeued_job_is_followed_into_its_next_slot(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answer(*RUNNING, "PENDING|BeginTime|", *RUNNING, "COMPLETED|None|node[1-2]", status="completed")
    assert cli.main(slurm.arguments) == cli.DONE
    shown = capsys.readouterr().err
    assert "job 7: PENDING (BeginTime)\n" in shown and shown.count("job 7: RUNNING on node[1-2]\n") == 2


def test_a_job_that_stopped_after_saving(slurm: FakeSlurm) -> None:
    slurm.answer(*RUNNING, "FAILED|NonZeroExitCode|node1", status="stopped")
    assert cli.main(slurm.arguments) == cli.STOPPED


def test_a_failed_job_shows_the_failing_ranks_own_error(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answer(*RUNNING, "FAILED|NonZeroExitCode|node1")
    slurm.left.write_error(1, ValueError("what rank 1 says"))
    assert cli.main(slurm.arguments) == cli.FAILED
    assert "Rank 1 of run 'job' failed with ValueError: what rank 1 says" in capsys.readouterr().err


def test_a_job_that_failed_before_training_shows_what_it_printed(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.log.write_text(
        "job 7.0: on node[1-2], rendezvous at node1:20007\nerror: of an earlier start\n"
        "job 7.1: on node[1-2], rendezvous at node1:20007\nnoise\nerror: no such model\nerror: no such model\n"
    )
    slurm.answer(*RUNNING, "FAILED|NonZeroExitCode|node1")
    assert cli.main(slurm.arguments) == cli.FAILED
    error = capsys.readouterr().err
    assert error.count("no such model") == 1 and "earlier start" not in error and "noise" not in error


@pytest.mark.parametrize(
    ("state", "why"),
    [("TIMEOUT", "raise --grace"), ("OUT_OF_MEMORY", "too little memory"), ("CANCELLED", "it was cancelled")],
)
def test_other_ends_are_told_in_words(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], state: str, why: str
) -> None:
    slurm.answer(*RUNNING, f"{state}|None|node1")
    assert cli.main(slurm.arguments) == cli.FAILED
    assert re.search(f"Job 7 ended as {state}: .*{why}.* it resumes: 'job' from step 0", capsys.readouterr().err)


def test_an_error_of_an_earlier_job_is_not_this_ones(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.run.write_error(0, ValueError("of yesterday"))
    slurm.answer("NODE_FAIL|None|node1")
    assert cli.main(slurm.arguments) == cli.FAILED
    error = capsys.readouterr().err
    assert "a node failed" in error and "of yesterday" not in error


def test_an_interrupt_takes_a_waiting_job_out_of_the_queue(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("PENDING|Resources|")
    threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
    assert cli.main(slurm.arguments) == cli.STOPPED
    assert (slurm.directory / "cancelled").read_text().startswith("--state=PENDING 7")
    assert "no step was run" in capsys.readouterr().err


def test_without_slurm_nothing_is_submitted(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.refuse("Batch job submission failed: Invalid partition name specified")
    assert cli.main(slurm.arguments) == cli.BAD_CONFIGURATION
    assert "SLURM refuses the job: Batch job submission failed" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert cli.main(slurm.arguments) == cli.BAD_CONFIGURATION
    assert "no sbatch here" in capsys.readouterr().err
