"""Commands ``reshape``, ``export`` and ``inspect``: everything to do with a checkpoint besides training."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from tutorial_lib.cli.options import DONE, FAILED, add_setting, given, reserve_stdout_for_json, shape_in_words
from tutorial_lib.config import FREE_ON_RESUME, START_ONLY, settings


def add_reshape_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the source and the settings that a reshape may change."""
    parser.description = (
        "Create a run NAME from SOURCE's checkpoint, rewritten for a different set of ranks. Settings that are not "
        "given are taken from SOURCE. No step is trained, and SOURCE does not change. To continue training in a "
        "different shape you need no reshape: run train with the same name and the new shape."
    )
    parser.add_argument("source", type=Path, help="a run's directory (its newest checkpoint), or one checkpoint")
    for setting in settings().values():
        # Accept the other settings too: the error that refuses them shows the run's value.
        add_setting(parser, setting, hidden=setting.flag not in FREE_ON_RESUME - START_ONLY, default=False)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the source, the target and the maximum size of a file."""
    parser.add_argument("source", type=Path, help="a run's directory (its newest checkpoint), or one checkpoint")
    parser.add_argument("target", type=Path, help="a new directory")
    parser.add_argument(
        "--max-shard-size", default="50GB", metavar="SIZE", help="maximum size of a weight file (default: 50GB)"
    )


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the path of a checkpoint or run."""
    parser.add_argument("path", type=Path, help="a checkpoint, or a run's directory")


def reshape(options: argparse.Namespace) -> int:
    from tutorial_lib import checkpoint, launch
    from tutorial_lib.checkpoint.compatibility import shape

    with reserve_stdout_for_json(options.json):
        run = launch.reshape(options.source, **given(options))
    made = {
        "run": str(run.config.directory),
        "checkpoint": str(checkpoint.latest(run.directory)),
        "step": run.result["step"],
        "reshaped_from": run.result["reshaped_from"],
        "shape": shape(run.config.flat()),
    }
    before, after = shape_in_words(made["reshaped_from"] or made["shape"]), shape_in_words(made["shape"])
    print(json.dumps(made) if options.json else f"{before}\n-> {after}: {made['checkpoint']}")
    return DONE


def export(options: argparse.Namespace) -> int:
    from tutorial_lib import checkpoint
    from tutorial_lib.checkpoint.directory import use_checkpoint

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the CPU merges shards; otherwise DeepSpeed warns of a missing GPU

    def export_from(source: Path) -> tuple[Path, Path]:
        return source, checkpoint.export(source, options.target, options.max_shard_size)

    with reserve_stdout_for_json(options.json):
        source, target = use_checkpoint(options.source, export_from)
    print(json.dumps({"checkpoint": str(source), "export": str(target)}) if options.json else f"{source} -> {target}")
    return DONE


def inspect(options: argparse.Namespace) -> int:
    from tutorial_lib.checkpoint import inspector

    found = inspector.inspect(options.path)
    print(json.dumps(found) if options.json else inspector.table(found))
    return DONE if found.get("intact", found.get("newest")) else FAILED
