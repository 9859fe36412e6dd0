"""Jobs that are followed through answers of a fake ``squeue``. ``tests/cluster`` follows real ones."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.launching import interrupt_when
from tutorial_lib import cli
from tutorial_lib.config import Config
from tutorial_lib.launch import Interrupted, WorkerError
from tutorial_lib.launch.slurm import submit_and_follow
from tutorial_lib.records import Row, RunDirectory

COMMAND = ["slurm", "--profile", "cpu", "--nodes", "2", "--ranks-per-node", "2"]


class FakeSlurm:
    """Fake SLURM programs that answer as told. A job leaves its files when it is ``COMPLETING``."""

    def __init__(self, directory: Path) -> None:
        self.run = RunDirectory(directory / "runs" / "job")
        self.log = directory / "slurm-job-7.out"
        self.arguments = [*COMMAND, "--name", "job", "--storage", str(directory / "runs"), "--submit"]
        self._programs = directory / "bin"
        self._programs.mkdir()
        self.left = RunDirectory(directory / "left")
        self.left.create()
        self._program("sbatch", f"cat > {directory}/submitted; echo 7")
        self._program("scancel", f'echo "$*" >> {directory}/cancelled; echo "CANCELLED||" > {directory}/state')
        self._program(
            "squeue",
            f"cd {directory}; touch asked; head -n 1 state; [[ $(wc -l < state) = 1 ]] && exit; sed -i 1d state\n"
            "[[ $(head -n 1 state) != COMPLETING* ]] || { mkdir -p runs/job; cp -r left/. runs/job; }",
        )
        self.directory = directory
        self.asked = directory / "asked"  # exists once the job is followed, when signals are already handled

    def _program(self, name: str, text: str) -> None:
        (self._programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self._programs / name).chmod(0o755)

    def answer(self, *states: str, **result: object) -> None:
        """Make ``squeue`` answer with these states in turn, and let the job leave a result."""
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


def test_a_requeued_job_that_fails_does_not_end_with_the_result_of_its_earlier_slot(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.log.write_text("job 7.1: on node1, rendezvous at node1:20007\nerror: node1 cannot resolve the name 'head'\n")
    again = ["PENDING|BeginTime|", "PENDING|BeginTime|", "RUNNING|None|node1", "FAILED|NonZeroExitCode|node1"]
    slurm.answer(*RUNNING, *again, status="stopped")
    assert cli.main(slurm.arguments) == cli.FAILED
    error = capsys.readouterr().err
    assert "Job 7 ended as FAILED" in error and "cannot resolve the name 'head'" in error


def test_a_requeued_job_that_is_cancelled_ends_with_the_result_of_its_earlier_slot(slurm: FakeSlurm) -> None:
    slurm.answer(*RUNNING, "PENDING|BeginTime|", "CANCELLED|None|", status="stopped")
    assert cli.main(slurm.arguments) == cli.STOPPED


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
def test_other_final_states_of_a_job_are_described(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], state: str, why: str
) -> None:
    slurm.answer("RUNNING|None|node1", f"{state}|None|node1")  # it ends before a rank creates the run's directory
    assert cli.main(slurm.arguments) == cli.FAILED
    assert re.search(f"Job 7 ended as {state}: .*{why}.* it resumes: 'job' from step 0", capsys.readouterr().err)


def test_errors_of_an_earlier_job_are_not_reported(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.run.create()
    slurm.run.write_error(0, ValueError("of yesterday"))
    slurm.answer("NODE_FAIL|None|node1")
    assert cli.main(slurm.arguments) == cli.FAILED
    error = capsys.readouterr().err
    assert "a node failed" in error and "of yesterday" not in error


def test_an_interrupt_takes_a_waiting_job_out_of_the_queue(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("PENDING|Resources|")
    striker = interrupt_when(slurm.asked.exists, number=signal.SIGTERM)
    assert cli.main(slurm.arguments) == cli.STOPPED
    striker.join()
    assert (slurm.directory / "cancelled").read_text().startswith("--state=PENDING 7")
    assert "no step was run" in capsys.readouterr().err


def test_a_second_interrupt_ends_only_the_watching_and_the_job_still_has_to_stop(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(rows: list[Row]) -> None:
        signal.raise_signal(signal.SIGINT)
        slurm.run.append({"step": rows[-1]["step"] + 1})  # a new row, so this is called again

    slurm.answer(*RUNNING)
    slurm.left.append({"step": 1})
    config = Config.create("cpu", name="job", storage=str(slurm.run.path.parent))
    with pytest.raises(Interrupted, match=r"job 7 is no longer watched.* `scancel 7`"):
        submit_and_follow("script", config, interrupt)
    assert slurm.run.stop_file.exists()
    assert "Interrupt again to stop watching the job" in capsys.readouterr().err


def test_a_job_that_is_cancelled_while_it_runs_is_not_said_to_have_waited(slurm: FakeSlurm) -> None:
    slurm.answer(*RUNNING, "CANCELLED|None|")
    slurm.left.append({"step": 1})
    config = Config.create("cpu", name="job", storage=str(slurm.run.path.parent))
    with pytest.raises(WorkerError, match="CANCELLED"):
        submit_and_follow("script", config, lambda rows: signal.raise_signal(signal.SIGTERM))


def test_a_cancel_that_slurm_does_not_answer_is_tried_again(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(command: list[str], **options: object) -> object:
        if command[0] == "scancel":
            raise subprocess.TimeoutExpired(command, 120)
        return run(command, **options)

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", silent)
    slurm.answer(*["PENDING|Priority|"] * 20, *RUNNING, "COMPLETED|None|node[1-2]", status="completed")
    thread = interrupt_when(slurm.asked.exists, number=signal.SIGTERM)
    assert cli.main(slurm.arguments) == cli.DONE
    thread.join()


def test_without_slurm_nothing_is_submitted(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.refuse("Batch job submission failed: Invalid partition name specified")
    assert cli.main(slurm.arguments) == cli.BAD_CONFIGURATION
    assert "SLURM refuses the job: Batch job submission failed" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert cli.main(slurm.arguments) == cli.BAD_CONFIGURATION
    assert "no sbatch here" in capsys.readouterr().err
