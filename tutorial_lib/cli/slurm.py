"""Command ``slurm``: write the batch script of a run, or submit it and follow the job."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import nullcontext
from typing import Any

from tutorial_lib.cli.options import DONE, STOPPED, add_setting, given, path_of, reserve_stdout_for_json
from tutorial_lib.cli.train import summary
from tutorial_lib.config import PROFILES, Config, ConfigError, settings
from tutorial_lib.config.workshop import parse_experiment

_CPUS_PER_RANK = {"cuda": 8, "cpu": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the allocation, and every setting of a run."""
    parser.description = (
        "Write a SLURM batch script that trains on several nodes, saves and requeues itself before its time limit, "
        "and resumes. dp follows from nodes, GPUs and tp."
    )
    add_node_options(parser)
    parser.add_argument("--time", default="01:00:00", metavar="LIMIT", help="time limit (default: 01:00:00)")
    parser.add_argument(
        "--grace", type=int, default=120, metavar="SECONDS",
        help="time before the limit at which to ask the run to save (default: 120)",
    )  # fmt: skip
    parser.add_argument("--partition", metavar="NAME", help="partition (queue) to submit to")
    parser.add_argument("--account", metavar="NAME", help="account to charge")
    parser.add_argument(
        "--requeue",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="requeue the job at its time limit, and continue (default: yes)",
    )
    parser.add_argument(
        "--sample-memory", action=argparse.BooleanOptionalAction, default=True,
        help="log the memory of each node's processes (default: yes)",
    )  # fmt: skip
    parser.add_argument(
        "--join-timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long a node waits for the others (default: 300)",
    )
    parser.add_argument("--output", type=path_of, metavar="FILE", help="write the script there instead of printing it")
    parser.add_argument("--submit", action="store_true", help="submit the script, and follow the job to its end")
    parser.add_argument("--profile", default="cluster", help=f"where it runs: {', '.join(PROFILES)} (default: cluster)")
    for setting in settings().values():
        add_setting(parser, setting)


def add_node_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the number of nodes, and of processes on each."""
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs, and therefore processes, on each node")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="with --profile cpu: processes on each node")
    parser.add_argument("--cpus-per-rank", type=int, metavar="N", help="cores per process (default: 8; on CPUs 1)")
    parser.add_argument(
        "--experiment", metavar="NAME", help="a name from the workshop: 3Z-8G4N is stage 3, 8 GPUs on 4 nodes"
    )


def main(options: argparse.Namespace) -> int:
    """Write or submit a batch script and return the exit code."""
    from tutorial_lib.launch.slurm import Allocation, write_script

    stated = given(options)
    nodes, ranks = nodes_and_ranks(options, stated)
    allocation = Allocation(
        nodes=nodes,
        ranks_per_node=ranks,
        cpus_per_rank=cpus_per_rank(options, stated),
        time_limit=options.time,
        grace=options.grace,
        requeue=options.requeue,
        sample_memory=options.sample_memory,
        join_timeout=options.join_timeout,
        partition=options.partition,
        account=options.account,
    )
    config = Config.create(options.profile, **add_dp({"launcher": "none", **stated}, allocation.world_size))
    script = write_script(
        config, allocation, options.profile, shlex.join(["python", "-m", "tutorial_lib", *sys.argv[1:]])
    )
    if options.submit:
        if options.output:
            options.output.write_text(script, encoding="utf-8")
        return _submit(config, script, options.json)
    hint = f"submit it with sbatch {shlex.quote(str(options.output))}"
    write_or_print("script", script, options, hint)
    return DONE


def write_or_print(kind: str, text: str, options: argparse.Namespace, hint: str) -> None:
    """Write a scheduler's file to ``--output`` and print a hint, or print the text; with ``--json``, print JSON."""
    if options.output:
        options.output.write_text(text, encoding="utf-8")
        print(f"{options.output}: {hint}", file=sys.stderr)
    if options.json:
        print(json.dumps({kind: text, "file": options.output and str(options.output)}))
    elif not options.output:
        print(text, end="")


def _submit(config: Config, script: str, as_json: bool) -> int:
    """Submit a batch script, follow the job, and return the same exit code as ``train``."""
    from tutorial_lib import launch
    from tutorial_lib.lab.progress import progress
    from tutorial_lib.launch.slurm import submit_and_follow

    shown = None if as_json else progress(config.run.stop_after or config.run.steps, title=config.run.name)
    with shown or nullcontext(), reserve_stdout_for_json(as_json):
        try:
            run = submit_and_follow(script, config, on_rows=shown.on_rows if shown else None)
        except launch.Interrupted as interrupted:
            print(interrupted, file=sys.stderr)
            return STOPPED
    print(json.dumps(run.result) if as_json else summary(run))
    return STOPPED if run.result["status"] == "stopped" else DONE


def cpus_per_rank(options: argparse.Namespace, stated: dict[str, Any]) -> int:
    """Return the number of cores for each process."""
    if options.cpus_per_rank is not None:
        return int(options.cpus_per_rank)
    return _CPUS_PER_RANK.get(_device(options, stated), 1)


def _device(options: argparse.Namespace, stated: dict[str, Any]) -> str:
    return str(stated.get("device") or Config.create(options.profile).run.device)


def nodes_and_ranks(options: argparse.Namespace, stated: dict[str, Any]) -> tuple[int, int]:
    """Return the numbers of nodes and of processes on each; add the settings of a named experiment to ``stated``."""
    from tutorial_lib.launch.command import check_positive

    device = _device(options, stated)
    own, other = ("gpus_per_node", "ranks_per_node") if device == "cuda" else ("ranks_per_node", "gpus_per_node")
    flag, wrong = (f"--{name.replace('_', '-')}" for name in (own, other))
    if getattr(options, other) is not None:
        raise ConfigError(f"{wrong} cannot be used with device={device!r}. Write {flag}.")
    if options.experiment is None:
        if getattr(options, own) is None:
            raise ConfigError(f"How many processes does each node run? Write {flag} N, or --experiment NAME.")
        check_positive(**{own: getattr(options, own)})
        return 1 if options.nodes is None else options.nodes, getattr(options, own)
    experiment = parse_experiment(options.experiment)
    decided = {"nodes": options.nodes, own: getattr(options, own), **stated}
    for name in ("nodes", own, *experiment.settings):
        if decided.get(name) is not None:
            raise ConfigError(
                f"Experiment {options.experiment} sets --{name.replace('_', '-')} itself. Leave one of them out."
            )
    stated.update({"name": options.experiment} | experiment.settings | stated)
    return experiment.nodes, experiment.gpus_per_node


def add_dp(stated: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Add ``dp``, which follows from the number of processes, to a run's settings."""
    tp = stated.get("tp", 1)
    dp = stated.get("dp", world_size // tp if isinstance(tp, int) and tp > 0 else 1) or 1
    return {**stated, "dp": dp}
