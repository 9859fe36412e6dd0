"""Command ``ray``: write the file that starts a Ray cluster for a run, in a cloud or on Kubernetes."""

from __future__ import annotations

import argparse
import shlex
import sys

from tutorial_lib.cli.options import DONE, add_setting, given, path_of
from tutorial_lib.cli.slurm import add_dp, add_node_options, cpus_per_rank, nodes_and_ranks, write_or_print
from tutorial_lib.config import PROFILES, Config, settings

_FORMATS = ("cluster-yaml", "rayjob")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the nodes, and every setting of a run."""
    parser.description = (
        "Write a cluster.yaml for Ray's cluster launcher (ray up), or a RayJob for KubeRay, that trains on several "
        "nodes. dp follows from nodes, GPUs and tp. On a Ray cluster that is already running, set RAY_ADDRESS and use "
        "`train --launcher ray`."
    )
    add_node_options(parser)
    parser.add_argument("--format", choices=_FORMATS, required=True, help="what to write")
    parser.add_argument(
        "--output", type=path_of, metavar="FILE", help="write the manifest there instead of printing it"
    )
    parser.add_argument("--profile", default="cluster", help=f"where it runs: {', '.join(PROFILES)} (default: cluster)")
    for setting in settings().values():
        add_setting(parser, setting)


def main(options: argparse.Namespace) -> int:
    """Write a manifest and return the exit code."""
    from tutorial_lib.launch.ray.manifest import Nodes, write_manifest

    stated = given(options)
    number, ranks = nodes_and_ranks(options, stated)
    nodes = Nodes(number=number, ranks_per_node=ranks, cpus_per_rank=cpus_per_rank(options, stated))
    config = Config.create(options.profile, **add_dp({"launcher": "ray", **stated}, nodes.world_size))
    command = shlex.join(["python", "-m", "tutorial_lib", *sys.argv[1:]])
    text = write_manifest(config, nodes, options.format, options.profile, command)
    write_or_print("manifest", text, options, "replace every FILL IN; its first lines say how to start it")
    return DONE
