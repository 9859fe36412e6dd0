"""Arguments of commands that differ from a test's usual ones."""

from collections.abc import Sequence


def changed(arguments: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Return a command's arguments with some of them replaced, such as by ``["--dp", "2"]``."""
    kept = list(arguments)
    for flag in (change for change in changes if change.startswith("--")):
        if flag in kept:
            del kept[kept.index(flag) : kept.index(flag) + 2]
    return [*kept, *changes]
