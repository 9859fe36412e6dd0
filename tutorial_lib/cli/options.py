"""Options that several commands share, and the exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from tutorial_lib.config import ConfigError, Setting, settings

DONE, FAILED, BAD_CONFIGURATION, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130


def add_setting(
    parser: argparse.ArgumentParser, setting: Setting, *, hidden: bool = False, default: bool = True
) -> None:
    """Add the option for a setting.

    Args:
        parser: parser to add it to.
        setting: the setting.
        hidden: whether to leave it out of the help.
        default: whether the help shows the default.
    """
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
            flag,
            type=_number_parser(kind, setting.help, setting.none_word),
            metavar=setting.flag.split("_")[-1].upper(),
            **shared,
        )


def _number_parser(kind: type, meaning: str, none_word: str | None = None) -> Callable[[str], Any]:
    """Return a function that parses a value or ``none_word``, and whose error message explains the argument."""

    def read(text: str) -> Any:
        if text == none_word:
            return None
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} ({meaning})") from None

    return read


def path_of(text: str) -> Path:
    """Return an argument as a path with ``~`` expanded, which a shell does not do in ``--output=~/file``."""
    return Path(text).expanduser()


def add_model_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--model-config NAME``, which means ``--model published/NAME``."""
    parser.add_argument(
        "--model-config",
        metavar="NAME",
        default=None,
        help="a published model's dimensions, for random weights (--random-init) and without a download: bloom-560m, "
        "gpt2, gpt2-medium or qwen2.5-0.5b; --model-config NAME is --model published/NAME",
    )


def model_of(options: argparse.Namespace) -> str | None:
    """Return the model named by ``--model`` or ``--model-config``, or None.

    Raises:
        ConfigError: both are given.
    """
    model: str | None = getattr(options, "model", None)
    named: str | None = getattr(options, "model_config", None)
    if named is None:
        return model
    if model is not None:
        raise ConfigError(f"--model {model} and --model-config {named} both name the model. Leave one of them out.")
    return f"published/{named}"


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given on the command line, by flat name."""
    given = {name: getattr(options, name) for name in settings() if hasattr(options, name)}
    if model := model_of(options):
        given["model"] = model
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def shape_in_words(shape: dict[str, Any]) -> str:
    """Format a shape as ``deepspeed, dp=2, tp=1, zero_stage=3``."""
    rest = {
        name: value for name, value in shape.items() if name not in ("engine", "device") and value not in (None, "none")
    }
    return ", ".join([shape["engine"], *(f"{name}={value}" for name, value in rest.items())])


def reserve_stdout_for_json(as_json: bool) -> AbstractContextManager[Any]:
    """Keep everything except JSON off standard output: DeepSpeed logs there when it is imported."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()
