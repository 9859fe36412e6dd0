"""Storage of a run on Ray: a check before the run that all nodes share it, and Ray's own list of checkpoints in it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tutorial_lib.config import ConfigError
from tutorial_lib.launch.ray.capacity import Node
from tutorial_lib.records import RunDirectory

ANSWER_SECONDS = 60
"""Seconds within which all nodes must answer. Each node starts a Python process to do so."""

_VISIBLE_SECONDS = 3
"""Seconds within which other nodes must see a new file: network file systems cache listings for a while."""


def check_shared(directory: Path, nodes: Sequence[Node]) -> None:
    """Refuse a directory that some node does not share with this one, in either direction.

    Args:
        directory: a directory that exists here.
        nodes: the nodes that may get workers.

    Raises:
        ConfigError: names the node and the directory.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = ray.get_runtime_context().get_node_id()
    others = {node.id: node for node in nodes if node.id != own}
    if not others:
        return
    here = next((node.name for node in nodes if node.id == own), "this node")
    probe = directory / f".shared-{uuid.uuid4().hex}"
    probe.write_text(here)
    task = ray.remote(num_cpus=0, max_retries=0)(_probe_from_node)
    try:
        answers = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(str(probe)): node
            for node in others
        }
        ready, late = ray.wait(list(answers), num_returns=len(answers), timeout=ANSWER_SECONDS)
        for answer in ready:
            problem = _problem(answer, directory, others[answers[answer]].name, here)
            if not problem and not _wait_for_file(probe.with_name(f"{probe.name}-{answers[answer]}")):
                problem = f"{here} does not see what {others[answers[answer]].name} writes into {directory}. {_SHARE}"
            if problem:
                raise ConfigError(problem)
        if late:
            names = ", ".join(others[answers[answer]].name for answer in late)
            raise ConfigError(
                f"{names} did not report within {ANSWER_SECONDS} s whether {directory} exists. `ray status` shows "
                "which nodes are alive. Remove the others, or try again."
            )
    finally:
        for path in directory.glob(f"{probe.name}*"):
            path.unlink(missing_ok=True)


_SHARE = (
    "Checkpoints and records need a directory that every node shares: write storage=... with one on a network file "
    "system, such as NFS, Lustre or a bucket that is mounted everywhere at the same path."
)


def _probe_from_node(probe: str) -> str:
    """Look for a file and write another one next to it, on another node. Return the problem, or an empty string."""
    import ray

    path = Path(probe)
    if not _wait_for_file(path):
        return "missing" if path.parent.is_dir() else "no directory"
    answer = path.with_name(f"{path.name}-{ray.get_runtime_context().get_node_id()}")
    try:
        answer.write_text("seen")
    except OSError as error:
        return str(error)
    return ""


def _wait_for_file(path: Path) -> bool:
    """Return whether a file is there, or appears soon."""
    until = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        with suppress(OSError):
            list(path.parent.iterdir())  # a listing makes NFS look again
        time.sleep(0.1)
    return True


def _problem(answer: Any, directory: Path, node: str, here: str) -> str:
    """Describe the problem on a node, or return an empty string if there is none."""
    import ray

    try:
        said = ray.get(answer)
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        return (
            f"{node} cannot run this package ({last}). Install it there: the same version as here, with the "
            "packages pinned in constraints.txt."
        )
    if said == "no directory":
        return f"{node} has no directory {directory}, although {here} has created it. {_SHARE}"
    if said == "missing":
        return f"{node} has its own {directory}: it does not see what {here} writes there. {_SHARE}"
    if said:
        return f"{node} cannot write into {directory}: {said}. Give the user of Ray's processes write permission."
    return ""


def forget_deleted_checkpoints(directory: RunDirectory) -> None:
    """Delete Ray's own list of a run's checkpoints if Ray would reject it: a resume reads our checkpoints anyway.

    Ray rejects the list if one of the checkpoints has been deleted, or if Ray was killed while writing it.
    """
    snapshot = directory.path / "checkpoint_manager_snapshot.json"
    if not snapshot.is_file():
        return
    try:
        listed = json.loads(snapshot.read_text(encoding="utf-8"))["checkpoint_results"]
        if all((directory.path / each["checkpoint_dir_name"]).exists() for each in listed):
            return
    except (ValueError, KeyError):
        pass
    snapshot.unlink()
