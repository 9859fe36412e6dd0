"""Scheduler files: their templates, the ``train`` command in them, and checks that a run fits their nodes."""

from __future__ import annotations

import shlex
import string

from tutorial_lib.config import Config, ConfigError, ParallelConfig, settings


class Template(string.Template):
    """Template with placeholders ``@{name}``, because shells use ``$`` themselves."""

    delimiter = "@"
    pattern = r"@\{(?P<braced>\w+)\}|(?P<escaped>(?!))|(?P<named>(?!))|(?P<invalid>(?!))"  # type: ignore[assignment]


def train_arguments(config: Config, profile: str, launcher: str) -> list[str]:
    """Return the arguments of ``train``: profile, launcher, the caller's settings, dp, name and storage.

    Raises:
        ConfigError: a value contains a line break, which would end a comment or a YAML value in the file.
    """
    config = config.with_absolute_paths()
    flat, known = config.flat(), settings()
    wanted = [name for name in flat if name in config.given | {"dp", "name", "storage"}]
    words = ["--profile", profile, "--launcher", launcher]
    for name in wanted:
        flag, value = f"--{name.replace('_', '-')}", flat[name]
        value = known[name].none_word if value is None else value
        if name == "launcher" or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words += [flag, str(value)]
    for word in words:
        if word.splitlines() not in ([], [word]):
            raise ConfigError(
                f"{word!r} contains a line break, which scheduler files cannot hold. Write it on one line."
            )
    return words


def as_comment(text: str) -> str:
    """Return text that continues a comment line: each of its further lines begins with ``#``, too."""
    return "\n# ".join(text.splitlines())


def check_positive(**numbers: int) -> None:
    """Refuse numbers below 1.

    Raises:
        ConfigError: names the number.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} is {number}; the smallest possible value is 1.")


def check_grid(parallel: ParallelConfig, nodes: int, ranks_per_node: int) -> None:
    """Refuse a rank grid that does not fill its nodes exactly, or has a tensor-parallel group that spans nodes.

    Raises:
        ConfigError: says what to write instead.
    """
    if ranks_per_node % parallel.tp:
        fitting = [size for size in range(1, ranks_per_node + 1) if ranks_per_node % size == 0]
        raise ConfigError(
            f"tp={parallel.tp} does not divide the {ranks_per_node} ranks of a node, so a tensor-parallel group would "
            f"span nodes. Write tp as one of {fitting}."
        )
    if parallel.world_size != nodes * ranks_per_node:
        raise ConfigError(
            f"dp x tp is {parallel.world_size}, but {nodes} x {ranks_per_node} ranks are {nodes * ranks_per_node}. "
            "Leave dp out: it follows from the nodes, their ranks and tp."
        )


def wrap_options(words: list[str], width: int) -> list[str]:
    """Return a shell command's quoted options in lines of about this width; an option stays with its values."""
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


def plural(number: int, one: str, more: str) -> str:
    """Return a number with the right form of its noun: ``1 node``, ``2 nodes``."""
    return f"{number} {one if number == 1 else more}"
