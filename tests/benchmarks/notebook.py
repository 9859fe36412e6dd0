"""Wall time of lessons 01 to 04, executed as in ``make run-notebooks``, with the data sets built beforehand."""

from __future__ import annotations

from typing import Any

from tests.notebooks.run import NOTEBOOKS, execute
from tutorial_lib.config import ConfigError
from tutorial_lib.embedded import DATASET_NAMES, dataset_directory

LESSONS = ("01_zero_finetuning", "02_tensor_data_parallel", "03_fsdp", "04_checkpoints")


def measure() -> dict[str, Any]:
    """Run each notebook once.

    Raises:
        ConfigError: a notebook is missing.
        RuntimeError: one of its cells failed.
    """
    for name in DATASET_NAMES:
        dataset_directory(name)
    lessons = {}
    for name in LESSONS:
        notebook = NOTEBOOKS / f"{name}.ipynb"
        if not notebook.is_file():
            raise ConfigError(f"There is no notebooks/{name}.ipynb to measure.")
        done = execute(notebook)
        if done.error:
            raise RuntimeError(f"{name} failed, see {done.output}: {done.error}")
        lessons[name] = {"seconds": done.seconds, "cells": done.cells}
    return {"lessons": lessons}
