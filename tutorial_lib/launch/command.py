"""The ``train`` command of a run, as a scheduler's file holds it, and the template of such a file."""

from __future__ import annotations

import shlex
import string

from tutorial_lib.config import Config


class Template(string.Template):
    """Template whose values are at ``@{name}``: the shell has its own use for ``$``."""

    delimiter = "@"
    pattern = r"@\{(?P<braced>\w+)\}|(?P<escaped>(?!))|(?P<named>(?!))|(?P<invalid>(?!))"  # type: ignore[assignment]


def train_arguments(config: Config, profile: str, launcher: str) -> list[str]:
    """Return the arguments of ``train``: the profile, the settings that were stated, and those that follow."""
    config = config.with_absolute_paths()
    flat = config.flat()
    wanted = [name for name in flat if name in config.given | {"dp", "name", "storage"}]
    words = ["--profile", profile, "--launcher", launcher]
    for name in wanted:
        flag, value = f"--{name.replace('_', '-')}", flat[name]
        if name == "launcher" or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words += [flag, str(value)]
    return words


def wrapped(words: list[str], width: int) -> list[str]:
    """Return the options of a shell command, quoted, in lines of about this width. A value stays with its option."""
    options: list[str] = []
    for word in words:
        if word.startswith("--"):
            options.append(word)
        else:
            options[-1] += f" {shlex.quote(word)}"
    lines = options[:1]
    for option in options[1:]:
        if len(f"{lines[-1]} {option}") > width:
            lines.append(option)
        else:
            lines[-1] += f" {option}"
    return lines


def count(number: int, one: str, more: str) -> str:
    """Return a number and what it counts: ``1 node``, ``2 nodes``."""
    return f"{number} {one if number == 1 else more}"
