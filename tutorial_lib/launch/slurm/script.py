"""SLURM batch script of a run: the resources to ask for, and the start of ``torchrun`` on each node.

The template is ``train.sbatch`` next to this module, with placeholders ``@{name}``.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
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

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,2}):(?P<minutes>[0-5]?\d):(?P<seconds>[0-5]?\d)")

_REQUEUE = """\
if [[ $is_asked_to_end ]]; then
    echo "job $attempt: saved; going back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM kills this script meanwhile
fi
"""

_SAMPLER = """\
python -m tutorial_lib.measure.memory_sampler "$run/logs/memory-$attempt-$SLURMD_NODENAME.jsonl" \\
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """Resources to ask SLURM for."""

    nodes: int
    ranks_per_node: int
    """One rank per GPU; on CPUs, the number of processes."""
    cpus_per_rank: int
    time_limit: str = "01:00:00"
    """``HOURS:MINUTES:SECONDS``, optionally with ``DAYS-`` in front."""
    grace: int = 120
    """Seconds before the time limit at which the run is asked to save and end."""
    requeue: bool = True
    """Requeue the job at its time limit, or when a node fails."""
    sample_memory: bool = True
    """Log the memory of each node's processes."""
    join_timeout: int = 300
    """Seconds that a node waits for the others."""
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        numbers = ("nodes", "ranks_per_node", "cpus_per_rank", "grace", "join_timeout")
        check_positive(**{name: getattr(self, name) for name in numbers})
        if self.grace >= _seconds(self.time_limit):
            raise ConfigError(
                f"The run would be asked to save {self.grace} s before its time limit of {self.time_limit}, which is "
                "before it starts. Write a longer time limit, or a shorter grace."
            )
        for name in ("partition", "account"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,-]+", value):
                raise ConfigError(f"{name} is {value!r}: write its name as SLURM shows it.")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def write_script(config: Config, allocation: Allocation, profile: str, command: str) -> str:
    """Return the text of a run's batch script.

    Args:
        config: what to run, with ``launcher='none'`` and as many ranks as the allocation has.
        allocation: the resources to ask for.
        profile: the profile that the configuration is based on.
        command: the command that the user typed, for a comment.

    Raises:
        ConfigError: the configuration does not fit the allocation.
    """
    _check(config.run, config.parallel, allocation)
    template = Path(__file__).with_name("train.sbatch").read_text(encoding="utf-8")
    engine, parallel = config.engine, config.parallel
    on_gpus = config.run.device == "cuda"
    ranks = plural(allocation.ranks_per_node, "process", "processes")
    places = f"{plural(allocation.nodes, 'node', 'nodes')} with {plural(allocation.ranks_per_node, *_PLACES[on_gpus])}"
    zero = engine.deepspeed_file or f"ZeRO stage {engine.zero_stage}"
    what = f"{engine.name}, {zero}" if engine.name == "deepspeed" else engine.name
    directory = config.with_absolute_paths().directory
    return Template(template).substitute(
        title=f"Run {config.run.name}: {what}, dp={parallel.dp} x tp={parallel.tp}, on {places}"
        + ("." if allocation.nodes == 1 else " each."),
        command=as_comment(command),
        directives="\n".join(_directives(config.run, allocation)),
        python_directory=shlex.quote(str(Path(sys.executable).parent)),
        cpus_per_rank=allocation.cpus_per_rank,
        run=shlex.quote(str(directory)),
        ranks_per_node_in_words=ranks,
        ranks_per_node=allocation.ranks_per_node,
        join_seconds=allocation.join_timeout,
        grace_in_words=f"{allocation.grace} s",
        sampler=_SAMPLER if allocation.sample_memory else "",
        train_arguments=" \\\n        ".join(wrap_options(train_arguments(config, profile, "none"), width=102)),
        requeue=_REQUEUE if allocation.requeue else "",
    )


_PLACES = {True: ("GPU", "GPUs"), False: ("process", "processes")}


def _directives(run: RunConfig, allocation: Allocation) -> list[str]:
    """Return the ``#SBATCH`` lines, with a comment where an option's purpose is not obvious."""
    on_gpus = run.device == "cuda"
    cpus = allocation.cpus_per_rank * allocation.ranks_per_node
    ranks = plural(allocation.ranks_per_node, "process", "processes")
    options = [
        (f"job-name={run.name}", ""),
        *((f"{name}={value}", "") for name in ("partition", "account") if (value := getattr(allocation, name))),
        (f"nodes={allocation.nodes}", ""),
        ("ntasks-per-node=1", f"one torchrun, which starts {ranks}"),
        *([(f"gpus-per-node={allocation.ranks_per_node}", "one per process")] if on_gpus else []),
        (f"cpus-per-task={cpus}", f"{allocation.cpus_per_rank} per process"),
        (f"time={allocation.time_limit}", ""),
        (f"signal=B:USR1@{allocation.grace}", f"{allocation.grace} s before the time limit: see save_and_end"),
        ("requeue", "at the time limit, and after a node failure") if allocation.requeue else ("no-requeue", ""),
        ("open-mode=append", "append to the log after a requeue"),
        (f"chdir={shlex.quote(str(Path.cwd()))}", ""),
        ("output=slurm-%x-%j.out", ""),
    ]
    return [f"#SBATCH --{option:27} # {reason}" if reason else f"#SBATCH --{option}" for option, reason in options]


def _check(run: RunConfig, parallel: ParallelConfig, allocation: Allocation) -> None:
    if run.launcher != "none":
        raise ConfigError(
            f"launcher={run.launcher!r} starts its ranks by itself; under SLURM torchrun starts them. Leave "
            "launcher out."
        )
    check_grid(parallel, allocation.nodes, allocation.ranks_per_node)
    if run.resume == "never" and allocation.requeue:
        raise ConfigError(
            "resume='never' would refuse the run's own checkpoint after a requeue. Leave it out, or write --no-requeue."
        )


def _seconds(time_limit: str) -> int:
    match = _TIME.fullmatch(time_limit)
    if not match:
        raise ConfigError(f"The time limit {time_limit!r} is ambiguous. Write HOURS:MINUTES:SECONDS, such as 01:30:00.")
    days, hours, minutes, seconds = (int(match[unit] or 0) for unit in ("days", "hours", "minutes", "seconds"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
