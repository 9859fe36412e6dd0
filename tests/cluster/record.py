"""Recording of a real SLURM on virtual nodes, which lesson 06 shows to readers without a cluster.

``python -m tests.cluster.record`` writes ``tutorial_lib/lab/recorded/cluster.json`` (as root, after ``make
cluster-tools``). ``test_recorded.py`` repeats four of its parts and compares the results.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbformat import NotebookNode

from tests.cluster.slurm_cluster import CORES, SlurmCluster
from tests.cluster.virtual_nodes import ROOT, VirtualNodes, end
from tutorial_lib import cli
from tutorial_lib.lab.scaling import RECORDING
from tutorial_lib.measure.memory_log import read_memory_log
from tutorial_lib.records import RunDirectory

SECONDS = 300
STEPS = 60
BOTH = "--nodelist=node[1-2]"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

JOB = ["--profile", "cpu", "--seq-length", "64", "--zero-stage", "2", "--no-evaluate", "--ranks-per-node", "1"]
"""Arguments of the lesson's job, without its nodes, steps and global batch."""

TWO_NODES = ["--nodes", "2", "--steps", str(STEPS), "--global-batch", "16"]

ASKED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "SLURM_LOCALID")

_TELL = f"import json, os; print(json.dumps({{name: os.environ.get(name) for name in {ASKED}}}))"


def lesson_script() -> str:
    """Return the training script that lesson 06 writes in a cell of its own."""
    (source,) = [cell.source for cell in _lesson().cells if cell.source.startswith("%%writefile")]
    return str(source.partition("\n")[2])


def lesson_batch_script() -> str:
    """Return the shortest batch script that lesson 06 shows."""
    text = "\n".join(cell.source for cell in _lesson().cells if cell.cell_type == "markdown")
    (script,) = re.findall(r"^```bash\n(#!.*?)^```", text, re.DOTALL | re.MULTILINE)
    return str(script)


def _lesson() -> NotebookNode:
    return nbformat.read(ROOT / "notebooks" / "06_scaling_out.ipynb", as_version=4)


def variables_of_srun(cluster: SlurmCluster, directory: Path) -> list[dict[str, str | None]]:
    """Return the environment variables of each of four tasks on two nodes, in the order of their numbers."""
    out = _srun(cluster, directory, ["--nodes=2", "--ntasks-per-node=2"], [sys.executable, "-c", _TELL])
    return sorted((json.loads(line) for line in out.splitlines()), key=lambda found: found["SLURM_PROCID"])


def lesson_on_two_nodes(cluster: SlurmCluster, directory: Path) -> list[dict[str, Any]]:
    """Return the output of the lesson's script with two processes on each of two nodes, by rank.

    The lesson's shortest batch script starts it, cut to what the virtual nodes have.
    """
    script = lesson_batch_script()
    for asked, there in {
        "#SBATCH --gpus-per-node=4\n": "",
        "--nproc-per-node=4": "--nproc-per-node=2",
        "--cpus-per-task=32": f"--cpus-per-task={CORES}",
        "OMP_NUM_THREADS=8 SRUN_CPUS_PER_TASK=32": f"OMP_NUM_THREADS=1 SRUN_CPUS_PER_TASK={CORES}",
        "torchrun": " ".join(TORCHRUN),
    }.items():
        assert script.count(asked) == 1, asked
        script = script.replace(asked, there)
    (directory / "train.py").write_text(lesson_script())
    (directory / "train.sbatch").write_text(script)
    job = cluster.submit(directory / "train.sbatch", f"--chdir={directory}", f"--output={directory / 'train.out'}")
    state = cluster.wait_for_end(job, SECONDS)
    if state != "COMPLETED":
        raise RuntimeError(f"{state}: {(directory / 'train.out').read_text()}")
    return [json.loads(path.read_text()) for path in sorted(directory.glob("rank-*.json"))]


def meet_over(nodes: VirtualNodes, interface: str) -> str:
    """Return how many ranks met, or PyTorch's error, when two nodes talk over this network interface."""
    join = (
        "import datetime, torch, torch.distributed as dist; "
        "dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=10)); "
        "present = torch.ones(1); dist.all_reduce(present); print(f'{present.item():.0f} ranks met'); "
        "dist.destroy_process_group()"
    )
    given = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": interface}
    started = [
        node.start(
            ["env", f"RANK={rank}", *(f"{name}={value}" for name, value in given.items()), sys.executable, "-c", join],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, node in enumerate(nodes.nodes[:2])
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            end(process)
    (said, *_) = re.findall(r"RuntimeError: (.*)|(.* ranks met)", "\n".join(outputs))
    return "".join(said)


class Job:
    """The lesson's job on some nodes, written by the command line."""

    def __init__(
        self, cluster: SlurmCluster, directory: Path, name: str, *flags: str, options: Sequence[str] = ()
    ) -> None:
        self.cluster, self.directory = cluster, directory
        self.script, self.output = directory / f"{name}.sbatch", directory / f"{name}.out"
        self.run = RunDirectory(directory / "runs" / name)
        arguments = ["slurm", *JOB, *flags, "--name", name, "--storage", str(directory / "runs")]
        assert cli.main([*arguments, "--output", str(self.script)]) == cli.DONE
        self.id = cluster.submit(self.script, f"--output={self.output}", *options)

    def finish(self) -> None:
        """Wait until the job ends.

        Raises:
            RuntimeError: the job did not complete.
        """
        state = self.cluster.wait_for_end(self.id, SECONDS)
        if state != "COMPLETED":
            raise RuntimeError(f"{state}: {self.output.read_text()}")

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.run.rows()]


def undisturbed(cluster: SlurmCluster, directory: Path) -> list[float]:
    """Return the losses of the lesson's job on two nodes."""
    job = Job(cluster, directory, "undisturbed", *TWO_NODES)
    job.finish()
    return job.losses


def preempted(cluster: SlurmCluster, directory: Path) -> dict[str, Any]:
    """Return the events, losses and output of the same job when a higher-priority job takes its nodes."""
    began = time.monotonic()
    events: list[dict[str, Any]] = []

    def note(what: str) -> None:
        events.append({"seconds": round(time.monotonic() - began, 1), "what": what})

    job = Job(cluster, directory, "preempted", *TWO_NODES, options=[BOTH])
    note("the job is submitted")
    cluster.wait_until(lambda: job.run.rows(), SECONDS, "a first step")
    note("it trains")
    cluster.wait_until(lambda: job.run.rows()[-1]["step"] >= 20, SECONDS, "some steps")
    urgent = directory / "urgent.sh"
    urgent.write_text("#!/usr/bin/env bash\nsrun sleep 3\n")
    other = cluster.submit(
        urgent, "--partition=urgent", "--nodes=2", BOTH, f"--cpus-per-task={CORES}", "--ntasks-per-node=1",
        "--output=/dev/null",
    )  # fmt: skip
    note("a job with a higher priority needs both nodes; SLURM sends USR1")
    cluster.wait_until(lambda: cluster.state(other) == "RUNNING", SECONDS, "the urgent job runs")
    note(f"saved at step {job.run.result()['step']}; back in the queue; the other job runs")
    stopped = job.run.result()
    cluster.wait_until(lambda: cluster.state(job.id) == "PENDING", SECONDS, "the job is queued again")
    assert cluster.wait_for_end(other, SECONDS) == "COMPLETED"
    note("the other job has ended")
    cluster.run(["scontrol", "update", f"JobId={job.id}", "StartTime=now+3"])
    cluster.wait_until(lambda: cluster.state(job.id) == "RUNNING", SECONDS, "the job runs again")
    note("the job runs again")
    job.finish()
    note("completed")
    result = job.run.result()
    return {
        "events": events,
        "stopped_by": stopped["stopped_by"],
        "stopped_at": stopped["step"],
        "resumed_from": result["resumed_from"],
        "restarts": int(cluster.job(job.id)["Restarts"]),
        "losses": job.losses,
        "output": [line for line in job.output.read_text().splitlines() if line.startswith("job ")],
    }


def scaling_row(cluster: SlurmCluster, directory: Path, nodes: int, steps: int = 12) -> dict[str, Any]:
    """Return one row of the workshop's table of multi-node scaling, from a job with 16 examples per step and node."""
    size = ["--nodes", str(nodes), "--steps", str(steps), "--global-batch", str(16 * nodes)]
    job = Job(cluster, directory, f"nodes-{nodes}", *size)
    job.finish()
    rows = job.run.rows()[1:]
    trees = [
        series.summary()
        for log in job.run.logs.glob("memory-*.jsonl")
        for series in read_memory_log(log).series
        if series.label == "process tree"
    ]
    tree = max(trees, key=lambda each: each.peak)
    return {
        "nodes": nodes,
        "samples_per_second": 16 * nodes * len(rows) / sum(row["seconds"] for row in rows),
        "step_seconds": statistics.median(row["seconds"] for row in rows),
        "train_loss": job.run.rows()[-1]["loss"],
        "memory_peak": tree.peak,
        "memory_mean": tree.mean,
        "memory_modes": list(tree.modes),
    }


def versions(cluster: SlurmCluster) -> dict[str, str]:
    """Return the date of the recording, the versions that it used, and a description of the machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "SLURM": cluster.run(["sinfo", "--version"]).removeprefix("slurm-wlm "),
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "machine": "two cores; each node is a set of Linux namespaces with an address of its own",
    }


def _srun(cluster: SlurmCluster, directory: Path, options: Sequence[str], command: Sequence[str]) -> str:
    srun = ["srun", "--time=5", f"--chdir={directory}", *options, *command]
    return cluster.run(srun, timeout=SECONDS)


def main() -> None:
    """Make the recording again, or only the named parts of it."""
    wanted = sys.argv[1:]
    found = json.loads(RECORDING.read_text()) if wanted and RECORDING.exists() else {}
    directory = ROOT / "build" / "record"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "slurm").mkdir()
    with VirtualNodes(8, [directory]) as nodes, SlurmCluster(nodes, directory / "slurm") as cluster:
        parts: dict[str, Any] = {
            "made": lambda: versions(cluster),
            "srun": lambda: variables_of_srun(cluster, directory),
            "torchrun": lambda: lesson_on_two_nodes(cluster, directory),
            "interfaces": lambda: {name: meet_over(nodes, name) for name in ("lo", "eth0")},
            "undisturbed": lambda: undisturbed(cluster, directory),
            "preempted": lambda: preempted(cluster, directory),
            "nodes": lambda: [scaling_row(cluster, directory, number) for number in (1, 2, 4, 8)],
        }
        for name, make in parts.items():
            if not wanted or name in wanted:
                print(name, "...", flush=True)
                found[name] = make()
                lines = [f"{json.dumps(part)}: {json.dumps(content)}" for part, content in found.items()]
                RECORDING.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
