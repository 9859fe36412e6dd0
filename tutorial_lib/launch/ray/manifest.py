"""Manifests that start a Ray cluster for a run: ``cluster.yaml`` for Ray's cluster launcher, or a KubeRay ``RayJob``.

The templates are ``cluster.yaml`` and ``rayjob.yaml`` next to this module, with placeholders ``@{name}``. Values that
only the owner of an account or a cluster knows, such as an image, are left as marked blanks to fill in.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tutorial_lib.config import Config, ConfigError, ParallelConfig, RunConfig
from tutorial_lib.launch.command import (
    Template,
    as_comment,
    check_grid,
    check_positive,
    plural,
    train_arguments,
    wrap_options,
)
from tutorial_lib.launch.ray.capacity import possible_sizes

_TEXTS = {"cluster-yaml": "cluster.yaml", "rayjob": "rayjob.yaml"}
_LONGEST_NAME = 47  # for a RayJob: Kubernetes allows 63 characters, and KubeRay appends some


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """The nodes that hold a run's ranks. The cluster's head node comes on top of these, and holds no ranks."""

    number: int
    ranks_per_node: int
    """One rank per GPU; on CPUs, the number of processes."""
    cpus_per_rank: int

    def __post_init__(self) -> None:
        check_positive(nodes=self.number, ranks_per_node=self.ranks_per_node, cpus_per_rank=self.cpus_per_rank)

    @property
    def world_size(self) -> int:
        return self.number * self.ranks_per_node


def write_manifest(config: Config, nodes: Nodes, kind: str, profile: str, command: str) -> str:
    """Return the text of a file that starts a cluster for a run.

    Args:
        config: what to run, with ``launcher='ray'`` and as many ranks as the nodes hold.
        nodes: the nodes to ask for.
        kind: ``cluster-yaml`` or ``rayjob``.
        profile: the profile that the configuration is based on.
        command: the command that the user typed, for a comment.

    Raises:
        ConfigError: the configuration does not fit the nodes.
    """
    _check(config.run, config.parallel, nodes)
    on_gpus = config.run.device == "cuda"
    storage = str(Path(config.with_absolute_paths().run.storage))
    arguments = wrap_options(train_arguments(config, profile, "ray"), width=100)
    lines = ["python -m tutorial_lib train", *arguments]
    remote = " \\\n#          ".join([f"RAY_ADDRESS=auto RAY_AUTH_MODE=token {lines[0]}", *lines[1:]])
    cpus = nodes.ranks_per_node * nodes.cpus_per_rank
    text = Path(__file__).with_name(_TEXTS[kind]).read_text(encoding="utf-8")
    return Template(text).substitute(
        title=f"Run {config.run.name}: dp={config.parallel.dp} x tp={config.parallel.tp}, on "
        f"{plural(nodes.number, 'node', 'nodes')} of {plural(nodes.ranks_per_node, 'rank', 'ranks')}.",
        command=as_comment(command),
        name=_name(config.run.name),
        ray=version("ray"),
        nodes=nodes.number,
        fewest_nodes=_fewest_nodes(config, nodes),
        cpus=cpus,
        gpus=nodes.ranks_per_node if on_gpus else 0,
        gpu_limit=f'\n                    nvidia.com/gpu: "{nodes.ranks_per_node}"' if on_gpus else "",
        storage=json.dumps(storage),
        mount=json.dumps(f"--volume <FILL IN: directory that every machine shares>:{shlex.quote(storage)}"),
        entrypoint="\n    ".join(lines),
        submit=f"ray exec cluster.yaml {shlex.quote(remote)}",
    )


def _name(run: str) -> str:
    """Turn a run's name into one that KubeRay allows: lower-case letters, digits and dashes, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    return (f"run-{name}" if name[0].isdigit() else name)[:_LONGEST_NAME].rstrip("-")


def _fewest_nodes(config: Config, nodes: Nodes) -> int:
    """Return the smallest number of nodes that the run can continue with."""
    return math.ceil(possible_sizes(config)[0] * config.parallel.tp / nodes.ranks_per_node)


def _check(run: RunConfig, parallel: ParallelConfig, nodes: Nodes) -> None:
    if run.launcher != "ray":
        raise ConfigError(f"launcher={run.launcher!r} does not run on a Ray cluster. Leave launcher out.")
    check_grid(parallel, nodes.number, nodes.ranks_per_node)
