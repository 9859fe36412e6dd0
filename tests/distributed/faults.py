"""Faults that a run survives, as tables for ``docs/faults.md``.

``tests/distributed/test_faults.py`` proves the first row by row, the tests of ``tests/cluster`` the other two.

``python -m tests.distributed.faults`` writes that page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"

AGAIN = "stops with an error that names the rank; the same command resumes from the newest intact checkpoint"
BACK = "resumes from the newest intact checkpoint before it, and says which was left out and why"
REFUSED = "refused before a process starts, with the cause and what to do"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to a run.

    Attributes:
        name: the run, or the test, that it happens to.
        happens: description of the fault.
        outcome: the promised outcome.
    """

    name: str
    happens: str
    outcome: str


FAULTS = (
    Fault("killed_in_forward", "SIGKILL of a rank in the forward pass (ZeRO-3)", AGAIN),
    Fault("killed_in_backward", "SIGKILL of a rank in the backward pass (ZeRO-1)", AGAIN),
    Fault("killed_in_update", "SIGKILL of a rank within the optimizer step (FSDP2)", AGAIN),
    Fault("killed_in_save", "SIGKILL of a rank while it saves", AGAIN),
    Fault(
        "killed_in_publish",
        "SIGKILL of rank 0 with a checkpoint complete and not yet renamed (ZeRO-3)",
        "stops with an error that names the rank; the same command renames the checkpoint and resumes from it",
    ),
    Fault("killed_in_prune", "SIGKILL of rank 0 while it deletes an old checkpoint (`keep_last`)", AGAIN),
    Fault("killed_in_report", "SIGKILL of rank 0 with half a row of `metrics.jsonl` written", AGAIN),
    Fault("save_raises", "an exception in one rank's save", AGAIN),
    Fault(
        "killed_in_write",
        "SIGKILL of a rank halfway through writing a file in the background (`async_save`)",
        AGAIN,
    ),
    Fault(
        "limit_in_write",
        "a rank hits the limit on file sizes while it writes in the background (`async_save`)",
        AGAIN,
    ),
    Fault(
        "signalled",
        "SIGTERM, as a scheduler sends it before the end of a slot",
        "saves, exits with 75; the same command resumes",
    ),
    Fault("launcher_killed", "SIGKILL of the launching process", "the ranks save and stop; the same command resumes"),
    Fault(
        "disk_full",
        "a disk that is full in the middle of a save",
        "stops and says so; with room again, the same command resumes",
    ),
    Fault("read_only", "storage that turns read-only", "stops and says so; writable again, the same command resumes"),
    Fault("truncated", "the newest checkpoint has a file that is cut short", BACK),
    Fault("flipped", "the newest checkpoint has one bit flipped in a rank's shard", BACK),
    Fault("missing", "the newest checkpoint lacks a rank's file", BACK),
    Fault("no_manifest", "the two newest checkpoints have lost their manifest", BACK),
    Fault("none_intact", "no checkpoint is intact", "refused with every cause; it never silently starts from step 0"),
    Fault("other_model", "the checkpoint belongs to a different model of the same name", REFUSED),
    Fault("other_tokenizer", "the checkpoint belongs to a different tokenizer", REFUSED),
    Fault("newer_format", "the checkpoint was written by a newer version", REFUSED),
    Fault(
        "two_starts",
        "two starts of one run at the same time",
        "the second is refused and told which process holds the run; the first is untouched",
    ),
    Fault(
        "ray_worker_killed",
        "SIGKILL of a Ray worker while it reports, `max_failures=1`",
        "Ray starts the workers again; `result.json` records when and why",
    ),
    Fault(
        "ray_node_dies",
        "a Ray node dies, another has room, `max_failures=1`",
        "Ray starts the workers on the other node",
    ),
)

ON_NODES = (
    Fault(
        "node_lost",
        "a node with half of the ranks loses power, `max_failures=1`, `min_dp`",
        "goes on with the ranks that have room, from the newest intact checkpoint; tensor-parallel groups stay whole",
    ),
    Fault(
        "node_back",
        "the node comes back",
        "grows back to all its ranks, from the next checkpoint on",
    ),
    Fault(
        "room_taken",
        "somebody else holds a part of the cluster",
        "ends after `resource_timeout` with what it wants and what is free on each node",
    ),
    Fault(
        "group_on_no_node",
        "no node has the CPUs or GPUs of a tensor-parallel group",
        "refused before a rank starts, with what each node has",
    ),
    Fault(
        "storage_not_shared",
        "a node does not see the storage",
        "refused before a rank starts, with the node and the directory",
    ),
)
"""Faults on several nodes under Ray."""

BETWEEN_NODES = (
    Fault(
        "time_limit",
        "a SLURM job's time limit comes near (USR1)",
        "saves, goes back into the queue, and resumes: final weights are bit for bit those of the undisturbed job",
    ),
    Fault("preempted", "a more urgent SLURM job takes the nodes", "saves, waits in the queue, and resumes"),
    Fault("cancelled", "`scancel`", "saves and ends; the same command resumes"),
    Fault(
        "slurm_node_fails",
        "a node of a SLURM job loses power",
        "is requeued, and resumes on another node from the newest intact checkpoint",
    ),
    Fault(
        "unknown_head",
        "the head node's name does not resolve",
        "`doctor --rendezvous`, which the batch script asks first, names it; torchrun ends after its flags' seconds",
    ),
    Fault("node_never_comes", "a node of torchrun never comes", "torchrun ends after its flags' seconds"),
    Fault("port_in_use", "the rendezvous port is in use", "`doctor --rendezvous` names it"),
    Fault(
        "wrong_interface",
        "`GLOO_SOCKET_IFNAME` names an interface that other nodes cannot reach",
        "refused with exit code 2, with the interfaces that can",
    ),
)
"""Faults under torchrun and SLURM."""


def proves(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test of ``tests/cluster`` as the proof of these faults; ``tests/unit/test_fault_table.py`` reads it."""
    return lambda test: test


def _table(faults: tuple[Fault, ...]) -> str:
    rows = "\n".join(f"| {fault.happens} | {fault.outcome} |" for fault in faults)
    return f"| what happens | what the run does |\n| --- | --- |\n{rows}"


def page() -> str:
    """Return the text of ``docs/faults.md``."""
    return f"""\
# What a run survives

Each of these {len(FAULTS)} faults is injected for real by `tests/distributed/test_faults.py`. Wherever a run resumes,
its rows and final weights are bit for bit those of the undisturbed run, and no intact checkpoint is lost.

{_table(FAULTS)}

## On several nodes

`tests/cluster/test_ray.py` injects these {len(ON_NODES)} on a Ray cluster of virtual nodes. Where the number of ranks
changes, each step has the same examples, and losses are those of the undisturbed run to 1e-6: sums add up in a
different order.

{_table(ON_NODES)}

`tests/cluster/test_torchrun.py` and `tests/cluster/test_slurm.py` inject these {len(BETWEEN_NODES)} under torchrun and
a real SLURM.

{_table(BETWEEN_NODES)}

`python -m tests.distributed.faults` writes this page.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
