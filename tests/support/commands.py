"""Command lines of runs. This module imports only the library, so that scripts without pytest can use it."""

from __future__ import annotations

from tutorial_lib.config import Config


def train_command(config: Config) -> list[str]:
    """Return the command line after ``python -m`` for a run with this configuration."""
    given = ["tutorial_lib", "train", "--json"]
    settings = config.flat()
    if config.run.steps:
        del settings["epochs"]  # `steps` sets the run's length
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        elif value not in (None, ()):
            given += [f"--{flag}", str(value)]
    return given
