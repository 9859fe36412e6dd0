"""The package from a shell: ``python -m tutorial_lib doctor | train | plan | reshape | export | inspect | bench``.

Exit codes, which scripts and schedulers may rely on: 0 done; 2 bad usage or configuration, or a plan in which nothing
fits, with what to write instead; 75 stopped before the end after saving, run it again to go on; 1 anything else, with
the failing rank's own error on top, or an inspected checkpoint that is not whole.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from tutorial_lib.cli import plan
from tutorial_lib.config import FREE_ON_RESUME, OF_ONE_START, PROFILES, Config, ConfigError, settings

DONE, FAILED, BAD_CONFIGURATION, STOPPED = 0, 1, 2, 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


class _Parser(argparse.ArgumentParser):
    """What is wrong in one line, instead of the names of all arguments."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_CONFIGURATION, f"error: {message}. See {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m tutorial_lib", description="Train on many devices, and measure it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what this machine can run, and why a profile will or will not work")
    doctor.set_defaults(command=_doctor)

    train = commands.add_parser("train", help="run or continue a training run")
    train.add_argument(
        "--profile",
        default="cpu",
        help=f"where it runs: {', '.join(PROFILES)}; the defaults below are those of cpu (default: cpu)",
    )
    for setting in settings().values():
        _add_setting(train, setting)
    train.set_defaults(command=_train)

    planned = commands.add_parser("plan", help="which dp x tp, ZeRO stage and offload fit given GPUs, fastest first")
    plan.add_arguments(planned)
    planned.set_defaults(command=plan.main)

    reshape = commands.add_parser(
        "reshape",
        help="make a run of a checkpoint, written anew for another number of ranks, engine or ZeRO stage",
        description="Make a run NAME whose checkpoint is SOURCE's, written anew by other ranks. What is not stated is "
        "as in SOURCE. No step is trained, and SOURCE stays as it is. To train on in another shape no reshape is "
        "needed: give train the same name, and the shape that is wanted.",
    )
    reshape.add_argument("source", type=Path, help="a run's directory (its newest checkpoint), or one checkpoint")
    for setting in settings().values():
        # The others are taken all the same, to be refused with the value that the run has.
        _add_setting(reshape, setting, hidden=setting.flag not in FREE_ON_RESUME - OF_ONE_START, default=False)
    reshape.set_defaults(command=_reshape)

    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face directory")
    export.add_argument("source", type=Path, help="a run's directory (its newest checkpoint), or one checkpoint")
    export.add_argument("target", type=Path, help="a new directory")
    export.add_argument(
        "--max-shard-size", default="50GB", metavar="SIZE", help="largest file of weights (default: 50GB)"
    )
    export.set_defaults(command=_export)

    inspect = commands.add_parser(
        "inspect", help="what a checkpoint, or a run's checkpoints, hold, and if they are whole"
    )
    inspect.add_argument("path", type=Path, help="a checkpoint, or a run's directory")
    inspect.set_defaults(command=_inspect)

    bench = commands.add_parser("bench", help="measure the figures that the README quotes, as ratios in one run")
    bench.add_argument("names", nargs="*", help="which benchmarks; default: all")
    bench.set_defaults(command=_bench)

    for command in (doctor, train, planned, reshape, export, inspect, bench):
        command.add_argument("--json", action="store_true", help="print JSON for machines")
    return parser


def _add_setting(parser: argparse.ArgumentParser, setting: Any, *, hidden: bool = False, default: bool = True) -> None:
    flag = "--" + setting.flag.replace("_", "-")
    shown = setting.help
    if default and setting.default not in (None, ()) and "default" not in shown:
        shown += f" (default: {setting.default})"
    if setting.choices:
        shown += f" [{', '.join(setting.choices)}]"
    shared: dict[str, Any] = {"dest": setting.flag, "default": argparse.SUPPRESS}
    shared["help"] = argparse.SUPPRESS if hidden else shown
    if setting.type is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
    elif setting.type == tuple[str, ...]:
        parser.add_argument(flag, nargs="+", metavar="PATTERN", **shared)
    else:
        kind = next((t for t in (int, float) if setting.type in (t, t | None)), str)
        parser.add_argument(
            flag, type=_reading(kind, setting.help), metavar=setting.flag.split("_")[-1].upper(), **shared
        )


def _reading(kind: type, meaning: str) -> Callable[[str], Any]:
    """A number, or an error that says what the argument means, where the values are named."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} ({meaning})") from None

    return read


def _doctor(options: argparse.Namespace) -> int:
    from tutorial_lib import doctor

    return doctor.main(json=options.json)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in settings() if hasattr(options, name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _train(options: argparse.Namespace) -> int:
    config = Config.create(options.profile, **_given(options))

    from tutorial_lib import launch
    from tutorial_lib.lab.progress import progress
    from tutorial_lib.mpu import Topology

    leader = int(os.environ.get("RANK", "0")) == 0
    shown = progress(config.run.stop_after or config.run.steps) if leader and not options.json else None
    if shown and config.parallel.tp > 1:
        print(Topology(config.parallel.dp, config.parallel.tp, rank=0).drawing(), file=sys.stderr)
    launch.warm_up(config)
    with shown or nullcontext(), _stdout_for_json_alone(options.json):
        try:
            run = launch.run(config, on_rows=shown.on_rows if shown else None)
        except launch.Interrupted as interrupted:
            if not interrupted.runs:
                print(interrupted, file=sys.stderr)
                return STOPPED
            run = interrupted.runs[0]
    if leader:
        print(json.dumps(run.result) if options.json else _summary(run))
    if run.result["status"] != "stopped":
        return DONE
    # torchrun takes any other code of a worker for a failure; result.json tells that the run goes on.
    return DONE if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED


def _summary(run: Any) -> str:
    result = run.result
    loss = {name: f"{result[name]:.4f}" for name in ("train_loss", "eval_loss_before", "eval_loss") if result[name]}
    rows = {
        "run": str(run.config.directory),
        "status": f"{result['status']} at step {result['step']} of {result['num_steps']}"
        + (f", resumed from {result['resumed_from']}" if result["resumed_from"] is not None else "")
        + (f" of {_words(result['reshaped_from'])}; random numbers seeded anew" if result["reshaped_from"] else "")
        + ("; give the same command again to go on" if result["status"] == "stopped" else ""),
        **{f"left out{' ' * n}": f"{o['checkpoint']}: {o['why']}" for n, o in enumerate(result["left_out"])},
        **{f"restart {n}": _restart(r) for n, r in enumerate(result["restarts"], 1)},
        **{name.replace("_", " "): value for name, value in loss.items()},
        "tokens per second": f"{result['tokens_per_second']:.0f}" if result["tokens_per_second"] else "too few steps",
        "peak memory": ", ".join(f"{rank['peak_memory_bytes'] / 2**20:.0f} MiB" for rank in result["ranks"]),
        "checkpoint": result["checkpoint"],
    }
    return "\n".join(f"{name:18} {value}" for name, value in rows.items())


def _restart(restart: dict[str, Any]) -> str:
    failed, when = restart["failed"], datetime.fromtimestamp(restart["time"], UTC).strftime("%H:%M:%S UTC")
    return f"from step {restart['from_step']} at {when}, as rank {failed['rank']} failed: {failed['message'][:200]}"


def _words(shape: dict[str, Any]) -> str:
    """A shape as ``deepspeed, dp=2, tp=1, zero_stage=3``."""
    rest = {
        name: value for name, value in shape.items() if name not in ("engine", "device") and value not in (None, "none")
    }
    return ", ".join([shape["engine"], *(f"{name}={value}" for name, value in rest.items())])


def _reshape(options: argparse.Namespace) -> int:
    from tutorial_lib import checkpoint, launch

    with _stdout_for_json_alone(options.json):
        run = launch.reshape(options.source, **_given(options))
    made = {
        "run": str(run.config.directory),
        "checkpoint": str(checkpoint.latest(run.directory)),
        "step": run.result["step"],
        "reshaped_from": run.result["reshaped_from"],
        "shape": checkpoint.shape(run.config.flat()),
    }
    before, after = _words(made["reshaped_from"] or made["shape"]), _words(made["shape"])
    print(json.dumps(made) if options.json else f"{before}\n-> {after}: {made['checkpoint']}")
    return DONE


def _export(options: argparse.Namespace) -> int:
    from tutorial_lib import checkpoint

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # shards are merged there; unasked, DeepSpeed warns of a missing GPU
    source = checkpoint.checkpoint_of(options.source)
    with _stdout_for_json_alone(options.json):
        target = checkpoint.export(source, options.target, options.max_shard_size)
    print(json.dumps({"checkpoint": str(source), "export": str(target)}) if options.json else f"{source} -> {target}")
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    from tutorial_lib.checkpoint.report import inspect, table

    report = inspect(options.path)
    print(json.dumps(report) if options.json else table(report))
    return DONE if report.get("whole", report.get("newest")) else FAILED


def _stdout_for_json_alone(as_json: bool) -> AbstractContextManager[Any]:
    """DeepSpeed logs to standard output when it is imported, which would make the JSON unreadable."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _bench(options: argparse.Namespace) -> int:
    # Benchmarks belong to the project, not to the installed package.
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests" / "benchmarks").is_dir():
        raise ConfigError("Benchmarks run from a clone of the project: tests/benchmarks is not here.")
    sys.path.insert(0, str(root))
    from tests.benchmarks.bench import main as bench

    return int(bench(options.names, as_json=options.json))
