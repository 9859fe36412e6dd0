"""Timestamps of Ray Train's controller, which finds this class through ``RAY_TRAIN_CALLBACKS``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback


class Marks(ControllerCallback, WorkerGroupCallback):
    """Callback that appends a line ``{"mark": name, "time": seconds}`` to a file at each stage of a fit's start.

    The environment names the file.
    """

    def __init__(self) -> None:
        # This runs in the driver. The controller gets a copy of this object.
        self._path = Path(os.environ["TUTORIAL_LIB_RAY_MARKS"])

    def _mark(self, name: str) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"mark": name, "time": time.time()}) + "\n")

    def after_controller_start(self, train_run_context: Any) -> None:
        self._mark("controller runs")

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        self._mark("worker group starts")
        yield

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._mark("workers exist")

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._mark("training function called")
