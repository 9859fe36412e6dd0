"""A SLURM cluster on virtual nodes: munge, slurmctld on the first node, slurmd on each.

Debian's packages ``slurm-wlm`` and ``munge`` provide the programs. The daemons write to one private directory only, so
an installed SLURM stays as it is. They live inside the nodes' namespaces, and end with them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.virtual_nodes import Node, VirtualNodes

_CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost={head.name}({head.address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
# Nodes may claim more cores than the machine has, because they share them.
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=bf_interval=1,sched_interval=1
KillWait=15
SlurmdTimeout=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""

CORES = 4
"""Cores that each node claims to have."""

ACTIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED"})


def find_program(name: str) -> str | None:
    """Return the path of one of SLURM's or munge's programs, or None."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class SlurmError(RuntimeError):
    """A command that failed, or a wait that timed out. The message of a timeout ends with SLURM's logs."""


class SlurmCluster:
    """A running SLURM on virtual nodes, as a context manager. The first node also runs the controller.

    Args:
        nodes: the virtual nodes.
        directory: an empty directory that all of them see.
    """

    def __init__(self, nodes: VirtualNodes, directory: Path) -> None:
        self.nodes, self.directory = nodes, directory
        self.head = nodes.nodes[0]
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def __enter__(self) -> SlurmCluster:
        self.directory.chmod(0o755)
        (self.directory / "state").mkdir()
        (self.directory / "munge.key").touch(mode=0o600)
        (self.directory / "munge.key").write_bytes(secrets.token_bytes(128))
        described = "\n".join(
            f"NodeName={node.name} NodeAddr={node.address} CPUs={CORES} CoresPerSocket={CORES} RealMemory=4000 "
            "State=UNKNOWN"
            for node in self.nodes.nodes
        )
        text = _CONFIGURATION.format(head=self.head, directory=self.directory, nodes=described)
        (self.directory / "slurm.conf").write_text(text)
        files = {name: self.directory / f"munge.{name}" for name in ("key", "socket", "pid", "log", "seed")}
        self._check(
            ["munged", "--force", f"--key-file={files['key']}", f"--socket={files['socket']}"]
            + [f"--{name}-file={files[name]}" for name in ("pid", "log", "seed")]
        )
        self._check(["slurmctld"])
        for node in self.nodes.nodes:
            self.start_daemon(node)
        self.wait_until(self._is_idle, 20, "all nodes are idle")
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: the daemons end with their nodes' namespaces."""

    def start_daemon(self, node: Node) -> None:
        """Start slurmd on a node."""
        self._check(["slurmd", "-N", node.name], node)

    def run(self, given: Sequence[str], node: Node | None = None, **options: Any) -> str:
        """Run a command, such as ``scontrol``, and return its output.

        Raises:
            SlurmError: it failed.
        """
        done = (node or self.head).run(given, env=self.environment, **options)
        if done.returncode:
            raise SlurmError(f"{' '.join(given)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, script: Path, *options: str) -> str:
        """Submit a batch script, and return the job's id."""
        return self.run(["sbatch", "--parsable", *options, str(script)])

    def state(self, job: str) -> str:
        """Return a job's state, such as ``RUNNING``."""
        return self.job(job)["JobState"]

    def job(self, job: str) -> dict[str, str]:
        """Return the output of ``scontrol show job``."""
        shown = self.run(["scontrol", "--oneliner", "show", "job", job])
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)

    def wait_for_end(self, job: str, seconds: float) -> str:
        """Wait until a job has ended, and return its last state."""
        self.wait_until(lambda: self.state(job) not in ACTIVE, seconds, f"job {job} ends")
        return self.state(job)

    def wait_until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait for something to become true.

        Raises:
            SlurmError: it did not become true within this time.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = [f"{log.name}:\n" + "\n".join(_tail(log)) for log in sorted(self.directory.glob("*.log"))]
                raise SlurmError(f"Waited {seconds} s in vain for: {what}.\n" + "\n".join(logs))
            time.sleep(0.1)

    def _is_idle(self) -> bool:
        return self.run(["sinfo", "--noheader", "--Node", "--format=%T", "--partition=normal"]).split() == [
            "idle"
        ] * len(self.nodes.nodes)

    def _check(self, given: Sequence[str], node: Node | None = None) -> None:
        self.run([str(find_program(given[0])), *given[1:]], node)


def _tail(log: Path, lines: int = 15) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:]
