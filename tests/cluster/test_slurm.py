"""The batch script that ``python -m tutorial_lib slurm`` writes, submitted to a real SLURM on two virtual nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster
from tests.cluster.weights import trained_weights
from tutorial_lib import cli
from tutorial_lib.measure.sampler_log import read_sampler
from tutorial_lib.records import RunDirectory

STEPS = 6
SECONDS = 120
"""For one start of a tiny run on two busy cores, which takes 13 when they are idle."""


class Job:
    """A run's batch script, written by the command line and submitted to the cluster."""

    def __init__(self, cluster: SlurmCluster, inputs: Path, name: str, *flags: str, nodes: int = 2) -> None:
        self.cluster = cluster
        self.script, self.output = inputs / f"{name}.sbatch", inputs / f"{name}.out"
        self.run = RunDirectory(inputs / "runs" / name)
        training = [
            *("--profile", "cpu", "--zero-stage", "2", "--seq-length", "64", "--max-examples", "160", "--no-evaluate"),
            *("--model", str(inputs / "gpt2-dropout"), "--name", name, "--storage", str(inputs / "runs")),
        ]
        asked = ["--nodes", str(nodes), "--ranks-per-node", str(2 // nodes), "--output", str(self.script)]
        assert cli.main(["slurm", *asked, *training, *flags]) == cli.DONE

    def submit(self, *options: str) -> None:
        self.id = self.cluster.submit(self.script, f"--output={self.output}", *options)

    def finish(self, seconds: float = SECONDS) -> str:
        """Wait for the end; returns the last state."""
        return self.cluster.wait_for_end(self.id, seconds)

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait_until(lambda: any(r["step"] >= step for r in self.run.rows()), SECONDS, f"step {step}")

    def go_on_now(self) -> None:
        """Wait until the job is back in the queue, and start it at once instead of after two minutes."""
        self.cluster.wait_until(lambda: self.cluster.state(self.id) == "PENDING", SECONDS, "the job is queued again")
        self.cluster.run(["scontrol", "update", f"JobId={self.id}", "StartTime=now"])


@pytest.fixture(scope="session")
def undisturbed(cluster: SlurmCluster, inputs: Path) -> Job:
    """A job that nobody has disturbed, after its end."""
    job = Job(cluster, inputs, "undisturbed", "--steps", str(STEPS))
    job.submit()
    assert job.finish() == "COMPLETED", job.output.read_text()
    return job


def test_a_job_runs_on_both_nodes(cluster: SlurmCluster, shared: Path) -> None:
    script = shared / "hello.sh"
    script.write_text("#!/usr/bin/env bash\n#SBATCH --nodes=2 --ntasks-per-node=1\nsrun hostname | sort\n")
    job = cluster.submit(script, f"--output={script}.out")
    assert cluster.wait_for_end(job, 20) == "COMPLETED"
    assert Path(f"{script}.out").read_text() == "node1\nnode2\n"


def test_the_generated_script_trains_on_two_nodes(undisturbed: Job) -> None:
    assert undisturbed.run.result()["status"] == "completed"
    assert [row["step"] for row in undisturbed.run.rows()] == list(range(1, STEPS + 1))
    assert undisturbed.cluster.job(undisturbed.id)["ExitCode"] == "0:0"


def test_the_memory_of_each_node_is_logged(undisturbed: Job) -> None:
    logs = sorted(undisturbed.run.logs.glob("memory-*.jsonl"))
    assert [log.name for log in logs] == [f"memory-{undisturbed.id}.0-node{n}.jsonl" for n in (1, 2)]
    for log in logs:
        # torchrun and one rank, each with torch loaded.
        assert max(max(series.num_bytes) for series in read_sampler(log).series) > 300 * 2**20


def test_a_job_saves_before_its_time_limit_and_resumes_after_a_requeue(
    cluster: SlurmCluster, inputs: Path, undisturbed: Job, tmp_path: Path
) -> None:
    """SLURM sends USR1 to the batch script; here scancel does, as nobody wants to wait for a limit in minutes."""
    job = Job(cluster, inputs, "disturbed", "--steps", str(STEPS))
    job.submit()
    job.wait_for_step(2)
    cluster.run(["scancel", "--batch", "--signal=USR1", job.id])
    job.go_on_now()
    stopped_at = job.run.result()["step"]
    assert job.run.result()["stopped_by"] == "SIGUSR1" and stopped_at < STEPS
    assert job.finish() == "COMPLETED", job.output.read_text()
    assert cluster.job(job.id)["Restarts"] == "1"
    assert job.run.result()["resumed_from"] == stopped_at
    assert [row["step"] for row in job.run.rows()] == list(range(1, STEPS + 1))
    ours, theirs = trained_weights(job.run, tmp_path), trained_weights(undisturbed.run, tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
