"""The batch script that ``python -m tutorial_lib slurm`` writes, submitted to a real SLURM on two virtual nodes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.exported_weights import trained_weights
from tests.cluster.slurm_cluster import ACTIVE, CORES, SlurmCluster
from tests.distributed.faults.checks import assert_same_records
from tutorial_lib import cli
from tutorial_lib.measure.memory_log import read_sampler
from tutorial_lib.records import RunDirectory

STEPS = 40
"""Enough steps for a signal to arrive during training; they take seconds."""
SECONDS = 120
"""Seconds allowed for one start of a tiny run on two busy cores. On idle cores, a start takes 13."""


TWO_NODES = ["--nodes", "2", "--ranks-per-node", "1", "--zero-stage", "2"]
ON_ONE_NODE = ["--nodes", "1", "--ranks-per-node", "2", "--zero-stage", "2"]
"""The same ranks on a single node. If it is lost, the other node has room for them."""
ONE_PROCESS = ["--nodes", "1", "--ranks-per-node", "1", "--engine", "torch"]
"""A single process, which starts faster, for tests that do not depend on the number of processes."""


class Job:
    """A run's batch script, written by the command line and submitted to the cluster."""

    def __init__(self, cluster: SlurmCluster, inputs: Path, name: str, *flags: str) -> None:
        self.cluster = cluster
        self.script, self.output = inputs / f"{name}.sbatch", inputs / f"{name}.out"
        self.run = RunDirectory(inputs / "runs" / name)
        training = [
            *("--profile", "cpu", "--seq-length", "64", "--max-examples", "160", "--no-evaluate"),
            *("--model", str(inputs / "gpt2-dropout"), "--name", name, "--storage", str(inputs / "runs")),
        ]
        self.arguments = ["slurm", *training, *flags]
        assert cli.main([*self.arguments, "--output", str(self.script)]) == cli.DONE

    def follow(self) -> subprocess.Popen[str]:
        """Submit the job like a user who watches it until it ends."""
        command = [sys.executable, "-m", "tutorial_lib", *self.arguments, "--submit"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return self.cluster.head.start(command, self.script.parent, env=self.cluster.environment, **pipes)

    def submit(self, *options: str) -> None:
        self.id = self.cluster.submit(self.script, f"--output={self.output}", *options)

    def finish(self, seconds: float = SECONDS) -> str:
        """Wait until the job ends, and return its last state."""
        return self.cluster.wait_for_end(self.id, seconds)

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait_until(lambda: any(r["step"] >= step for r in self.run.rows()), SECONDS, f"step {step}")

    def wait_until_queued(self) -> None:
        """Wait until the job is back in the queue, and fail if it ends instead."""

        def is_queued() -> bool:
            state = self.cluster.state(self.id)
            assert state in ACTIVE, f"{state}: {self.output.read_text()}"
            return state == "PENDING"

        self.cluster.wait_until(is_queued, SECONDS, "the job is queued again")

    def resume_soon(self, **changes: str) -> None:
        """Wait until the job is back in the queue, and let it start after three seconds instead of two minutes.

        It cannot start at once, because a node rejects a credential issued in the second in which the old one expired.
        """
        self.wait_until_queued()
        asked = {"StartTime": "now+3", **changes}
        self.cluster.run(["scontrol", "update", f"JobId={self.id}", *(f"{k}={v}" for k, v in asked.items())])


@pytest.fixture(scope="session")
def uninterrupted(cluster: SlurmCluster, inputs: Path) -> Job:
    """Run a job without interrupting it, and return it after its end."""
    job = Job(cluster, inputs, "uninterrupted", *TWO_NODES, "--steps", str(STEPS))
    job.submit()
    assert job.finish() == "COMPLETED", job.output.read_text()
    return job


def assert_same_training(job: Job, uninterrupted: Job, scratch: Path) -> None:
    """Compare the losses and final weights of two jobs, bit for bit."""
    assert_same_records(job.run, uninterrupted.run)
    ours, theirs = trained_weights(job.run, scratch), trained_weights(uninterrupted.run, scratch)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_job_runs_on_both_nodes(cluster: SlurmCluster, shared: Path) -> None:
    script = shared / "hello.sh"
    script.write_text("#!/usr/bin/env bash\n#SBATCH --nodes=2 --ntasks-per-node=1\nsrun hostname | sort\n")
    job = cluster.submit(script, f"--output={script}.out")
    assert cluster.wait_for_end(job, 20) == "COMPLETED"
    assert Path(f"{script}.out").read_text() == "node1\nnode2\n"


def test_the_generated_script_trains_on_two_nodes(uninterrupted: Job) -> None:
    assert uninterrupted.run.result()["status"] == "completed"
    assert [row["step"] for row in uninterrupted.run.rows()] == list(range(1, STEPS + 1))
    job = uninterrupted.cluster.job(uninterrupted.id)
    assert (job["NumNodes"], job["NumTasks"], job["CPUs/Task"], job["ExitCode"]) == ("2", "2", "1", "0:0")
    assert (job["TimeLimit"], job["Requeue"], job["JobName"]) == ("01:00:00", "1", "uninterrupted")


def test_the_memory_of_each_node_is_logged(uninterrupted: Job) -> None:
    logs = sorted(uninterrupted.run.logs.glob("memory-*.jsonl"))
    assert [log.name for log in logs] == [f"memory-{uninterrupted.id}.0-node{n}.jsonl" for n in (1, 2)]
    for log in logs:
        # torchrun and one rank, each with torch loaded.
        assert max(max(series.num_bytes) for series in read_sampler(log).series) > 300 * 2**20


@pytest.mark.fault(
    "a SLURM job's time limit comes near (USR1)",
    "saves, requeues itself, and resumes: final weights are bit for bit those of the uninterrupted job",
)
def test_a_job_saves_before_its_time_limit_and_resumes_after_a_requeue(
    cluster: SlurmCluster, inputs: Path, uninterrupted: Job, tmp_path: Path
) -> None:
    """Near a time limit, SLURM sends USR1 to the batch script. Here scancel does, because time limits take minutes."""
    job = Job(cluster, inputs, "interrupted", *TWO_NODES, "--steps", str(STEPS))
    job.submit()
    job.wait_for_step(2)
    cluster.run(["scancel", "--batch", "--signal=USR1", job.id])
    job.resume_soon()
    stopped_at = job.run.result()["step"]
    assert job.run.result()["stopped_by"] == "SIGUSR1" and stopped_at < STEPS
    assert job.finish() == "COMPLETED", job.output.read_text()
    assert cluster.job(job.id)["Restarts"] == "1"
    assert job.run.result()["resumed_from"] == stopped_at
    assert_same_training(job, uninterrupted, tmp_path)


def test_submit_ends_with_the_exit_code_of_train(cluster: SlurmCluster, inputs: Path) -> None:
    """Two jobs run at the same time, so their processes must meet at different ports in case they share a node."""
    stopping = Job(cluster, inputs, "stopping", *ONE_PROCESS, "--steps", "4", "--stop-after", "1")
    failing = Job(cluster, inputs, "failing", *ONE_PROCESS, "--steps", "4", "--learning-rate", "1e30")
    stopped, failed = (job.follow() for job in (stopping, failing))
    out, err = stopped.communicate(timeout=SECONDS)
    assert stopped.returncode == cli.STOPPED, err
    assert "stopped at step 1 of 4" in out and "RUNNING on node" in err
    out, err = failed.communicate(timeout=SECONDS)
    assert failed.returncode == cli.FAILED
    assert "Rank 0 of run 'failing' failed with NonFiniteLoss" in err
    ports = {re.search(r"rendezvous at node\d:(\d+)", log.read_text())[1] for log in inputs.glob("slurm-*ing-*.out")}
    assert len(ports) == 2


@pytest.mark.fault("a higher-priority SLURM job takes the nodes", "saves, waits in the queue, and resumes")
@pytest.mark.fault("`scancel`", "saves and ends; the same command resumes")
def test_a_preempted_job_saves_and_resumes_later_and_a_cancelled_one_saves(cluster: SlurmCluster, inputs: Path) -> None:
    job = Job(cluster, inputs, "preempted", *ONE_PROCESS, "--steps", "3000")
    job.submit("--nodelist=node1")
    job.wait_for_step(2)
    urgent = inputs / "urgent.sh"
    urgent.write_text("#!/usr/bin/env bash\nsleep 1\n")
    first = cluster.submit(
        urgent, "--partition=urgent", "--nodelist=node1", f"--cpus-per-task={CORES}", "--output=/dev/null"
    )
    assert cluster.wait_for_end(first, SECONDS) == "COMPLETED"
    stopped_at = job.run.result()["step"]
    assert job.run.result()["stopped_by"] == "SIGUSR1"
    job.resume_soon()
    cluster.wait_until(lambda: job.run.rows()[-1]["step"] > stopped_at, SECONDS, "the job goes on")
    cluster.run(["scancel", job.id])
    assert job.finish() == "CANCELLED"
    result = job.run.result()
    assert (result["resumed_from"], result["stopped_by"]) == (stopped_at, "SIGTERM")
    assert result["step"] > stopped_at


@pytest.mark.fault(
    "a node of a SLURM job loses power",
    "is requeued, and resumes on another node from the newest intact checkpoint: losses and final weights are bit for "
    "bit those of the uninterrupted job",
)
def test_a_job_continues_on_another_node_when_its_node_fails(
    cluster_to_break: SlurmCluster, inputs: Path, uninterrupted: Job, tmp_path: Path
) -> None:
    cluster = cluster_to_break
    job = Job(cluster, inputs, "orphaned", *ON_ONE_NODE, "--steps", str(STEPS), "--checkpoint-every", "10")
    job.submit("--exclude=node1")
    job.wait_for_step(11)
    cluster.nodes.nodes[1].kill()
    last = job.run.rows()[-1]["step"]
    job.resume_soon(ExcNodeList="")
    assert job.finish() == "COMPLETED", job.output.read_text()
    assert cluster.job(job.id)["BatchHost"] == "node1"
    resumed_from = job.run.result()["resumed_from"]
    assert 10 <= resumed_from <= last < STEPS and resumed_from % 10 == 0
    assert_same_training(job, uninterrupted, tmp_path)
