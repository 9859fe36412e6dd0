"""Wall time of the first lesson, executed as ``make run-notebooks`` does it, with its data sets built before."""

from __future__ import annotations

from typing import Any

from tests.notebooks.run import NOTEBOOKS, execute
from tutorial_lib.config import ConfigError
from tutorial_lib.embedded import DATASET_NAMES, dataset_directory

NAME = "01_zero_finetuning"


def measure() -> dict[str, Any]:
    """Run the notebook once.

    Raises:
        ConfigError: it is not there.
        RuntimeError: one of its cells failed.
    """
    notebook = NOTEBOOKS / f"{NAME}.ipynb"
    if not notebook.is_file():
        raise ConfigError(f"There is no notebooks/{NAME}.ipynb to measure.")
    for name in DATASET_NAMES:
        dataset_directory(name)
    done = execute(notebook)
    if done.error:
        raise RuntimeError(f"{NAME} failed, see {done.output}: {done.error}")
    return {"notebook": NAME, "seconds": done.seconds, "cells": done.cells}
