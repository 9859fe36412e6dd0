"""Command line: ``python -m tutorial_lib COMMAND``, with ``train``, ``bench``, ``slurm``, ``ray`` and more.

Exit codes, which scripts and schedulers may rely on: 0 done; 2 bad usage or configuration, or a plan in which nothing
fits, with advice on what to write instead; 75 stopped early, with everything saved that the same command needs to
continue; 130 interrupted, and ended at once without saving; 1 anything else: a failed run, with the failing rank's own
error on top, an inspected checkpoint that is damaged, or a matrix with a failed row.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from tutorial_lib.cli import bench, checkpoints, plan, ray, slurm, train
from tutorial_lib.cli.options import BAD_CONFIGURATION, DONE, FAILED, INTERRUPTED, STOPPED
from tutorial_lib.config import ConfigError

__all__ = ["BAD_CONFIGURATION", "DONE", "FAILED", "INTERRUPTED", "STOPPED", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted: ended at once, without saving", file=sys.stderr)
        return INTERRUPTED


class _Once(argparse.Action):
    """Store a value. Giving an option twice is an error; argparse would silently forget the first value."""

    is_used = False

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _refuse_twice(self)
        setattr(namespace, self.dest, values)


class _OnceOrNo(argparse.BooleanOptionalAction):
    """Store true for ``--x``, false for ``--no-x``. Giving both, or one of them twice, is an error."""

    is_used = False

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _refuse_twice(self)
        super().__call__(parser, namespace, values, option_string)


def _refuse_twice(action: _Once | _OnceOrNo) -> None:
    if action.is_used and action.option_strings:
        raise argparse.ArgumentError(action, "it is given twice; write it once")
    action.is_used = True


class _Parser(argparse.ArgumentParser):
    """Parser that reports an error in one line, without listing all arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in (None, "store"):
            self.register("action", name, _Once)
        self.register("action", argparse.BooleanOptionalAction, _OnceOrNo)

    def parse_known_args(self, *given: Any, **options: Any) -> Any:
        """Refuse an unknown option in its command's own parser, which can suggest the one that was meant."""
        found, unknown = super().parse_known_args(*given, **options)
        if unknown:
            flags = [each.partition("=")[0] for each in unknown if each.startswith("--")]
            near = [difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.8) for flag in flags]
            hint = ", ".join(name for names in near for name in names)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f" (did you mean {hint}?)" if hint else ""))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_CONFIGURATION, f"error: {message}. See {self.prog} --help.\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. ``command`` in the parsed options runs the chosen one."""
    parser = _Parser(prog="python -m tutorial_lib", description="Train on many devices, and measure what it costs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pages = {
        "doctor": (
            _add_doctor_arguments,
            _doctor,
            "show what this machine can run, and why a profile will or will not work",
        ),
        "train": (train.add_arguments, train.main, "run or continue a training run"),
        "bench": (bench.add_arguments, bench.main, "run the same training in several ways, and compare them"),
        "slurm": (slurm.add_arguments, slurm.main, "write the SLURM batch script of a run, or submit and follow it"),
        "ray": (ray.add_arguments, ray.main, "write the cluster.yaml or RayJob that starts a Ray cluster for a run"),
        "plan": (
            plan.add_arguments,
            plan.main,
            "list the dp x tp, ZeRO stages and offload that fit given GPUs, fastest first",
        ),
        "reshape": (
            checkpoints.add_reshape_arguments,
            checkpoints.reshape,
            "rewrite a checkpoint as a new run with a different number of ranks, engine or ZeRO stage",
        ),
        "export": (
            checkpoints.add_export_arguments,
            checkpoints.export,
            "write a checkpoint as a Hugging Face directory",
        ),
        "inspect": (
            checkpoints.add_inspect_arguments,
            checkpoints.inspect,
            "show the contents of one or all checkpoints of a run, and whether they are intact",
        ),
    }
    for name, (add_arguments, command, help) in pages.items():
        page = commands.add_parser(name, help=help)
        add_arguments(page)
        page.add_argument("--json", action="store_true", help="print JSON instead of text")
        page.set_defaults(command=command)
    return parser


def _add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="only check that torchrun's processes can meet at this address"
    )


def _doctor(options: argparse.Namespace) -> int:
    from tutorial_lib import doctor

    if options.rendezvous:
        if problem := doctor.rendezvous_problem(options.rendezvous):
            raise ConfigError(problem)
        return DONE
    return doctor.main(json=options.json)
