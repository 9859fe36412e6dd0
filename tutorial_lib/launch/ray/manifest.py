"""Files that start a Ray cluster for a run: ``cluster.yaml`` of Ray's cluster launcher, and a KubeRay ``RayJob``.

The texts are in ``cluster.yaml`` and ``rayjob.yaml``, next to this page, with ``@{name}`` where a value belongs. What
only the owner of an account or a cluster knows, such as an image, is left open and says what to fill in.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch.command import Template, count, train_arguments, wrapped
from tutorial_lib.launch.ray.room import possible_sizes

_TEXTS = {"cluster-yaml": "cluster.yaml", "rayjob": "rayjob.yaml"}
_LONGEST_NAME = 47  # of a RayJob: Kubernetes allows 63 letters, and KubeRay appends some


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """The nodes that hold a run's ranks. The head of the cluster comes on top, and holds none."""

    number: int
    ranks_per_node: int
    """One per GPU; on CPUs, processes."""
    cpus_per_rank: int

    def __post_init__(self) -> None:
        for name in ("number", "ranks_per_node", "cpus_per_rank"):
            if getattr(self, name) < 1:
                shown = "nodes" if name == "number" else name
                raise ConfigError(f"{shown} is {getattr(self, name)}; the smallest possible value is 1.")

    @property
    def world_size(self) -> int:
        return self.number * self.ranks_per_node


def write_manifest(config: Config, nodes: Nodes, kind: str, profile: str, command: str) -> str:
    """Return the file that starts a cluster for a run.

    Args:
        config: what to run, with ``launcher='ray'`` and as many ranks as the nodes have places.
        nodes: where.
        kind: ``cluster-yaml`` or ``rayjob``.
        profile: the profile that the configuration was made from.
        command: what was typed, for a comment.

    Raises:
        ConfigError: the configuration and the nodes do not go together.
    """
    _check(config, nodes)
    on_gpus = config.run.device == "cuda"
    storage = str(Path(config.with_absolute_paths().run.storage))
    arguments = wrapped(train_arguments(config, profile, "ray"), width=100)
    lines = ["python -m tutorial_lib train", *arguments]
    cpus = nodes.ranks_per_node * nodes.cpus_per_rank
    text = Path(__file__).with_name(_TEXTS[kind]).read_text(encoding="utf-8")
    return Template(text).substitute(
        title=f"Run {config.run.name}: dp={config.parallel.dp} x tp={config.parallel.tp}, on "
        f"{count(nodes.number, 'node', 'nodes')} of {count(nodes.ranks_per_node, 'rank', 'ranks')}.",
        command=command,
        name=_name(config.run.name),
        ray=version("ray"),
        nodes=nodes.number,
        fewest_nodes=_fewest_nodes(config, nodes),
        cpus=cpus,
        gpus=nodes.ranks_per_node if on_gpus else 0,
        gpu_limit=f'\n                    nvidia.com/gpu: "{nodes.ranks_per_node}"' if on_gpus else "",
        storage=json.dumps(storage),
        mount=json.dumps(f"--volume <FILL IN: directory that every machine shares>:{storage}"),
        entrypoint="\n    ".join(lines),
        submit=" \\\n#          ".join(
            [f"ray exec cluster.yaml 'RAY_ADDRESS=auto RAY_AUTH_MODE=token {lines[0]}", *lines[1:]]
        )
        + "'",
    )


def _name(run: str) -> str:
    """Return a run's name as Kubernetes allows it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:_LONGEST_NAME].rstrip("-")


def _fewest_nodes(config: Config, nodes: Nodes) -> int:
    """Return the number of nodes with which the run can still go on."""
    return math.ceil(possible_sizes(config)[0] * config.parallel.tp / nodes.ranks_per_node)


def _check(config: Config, nodes: Nodes) -> None:
    if config.run.launcher != "ray":
        raise ConfigError(f"launcher={config.run.launcher!r} does not run on a Ray cluster. Leave launcher out.")
    if config.parallel.world_size != nodes.world_size:
        raise ConfigError(
            f"dp x tp is {config.parallel.world_size}, and {nodes.number} x {nodes.ranks_per_node} ranks are "
            f"{nodes.world_size}. Leave dp out: it follows from the others."
        )
    if nodes.ranks_per_node % config.parallel.tp:
        raise ConfigError(
            f"tp={config.parallel.tp} does not divide the {nodes.ranks_per_node} ranks of a node, so that a "
            "tensor-parallel group would span nodes. Write a tp that does."
        )
