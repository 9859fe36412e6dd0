"""Seconds from ``launch.run`` with Ray Train to the end of the first step, by part, for a first and a second fit."""

from __future__ import annotations

import json
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from tutorial_lib import launch
from tutorial_lib.config import Config

PARTS = (
    "checks before any process starts, with their imports",
    "import of Ray, ray.init",
    "controller: process and imports",
    "worker group: placement",
    "two workers: processes and imports",
    "process group",
    "training function: import, tokenizer, data, engine, evaluation",
    "first step",
    "checkpoint and end of the fit",
)


def measure() -> dict[str, Any]:
    """Measure two one-step fits on two workers. The first fit starts Ray, and the second finds it running."""
    from tutorial_lib.launch.ray import cluster  # imports Ray only when it starts Ray, so the import is measured

    with tempfile.TemporaryDirectory(prefix="tutorial-lib-bench-") as storage:
        with mock.patch.object(cluster, "stop"):  # the first fit leaves Ray running for the second
            first = _fit(Path(storage), "first")
        second = _fit(Path(storage), "second")
        began = time.time()
        cluster.stop()
    return {**first, "second": second, "seconds_to_stop": time.time() - began}


def _fit(storage: Path, name: str) -> dict[str, Any]:
    from tutorial_lib.launch.ray import cluster

    marks_file = storage / f"marks-{name}.jsonl"
    config = Config.create("cpu", launcher="ray", dp=2, steps=1, storage=str(storage), name=name)
    times: dict[str, float] = {}
    start = cluster.start

    def timed_start(*args: Any) -> bool:
        times["start"] = time.time()
        started = start(*args)
        times["started"] = time.time()
        return started

    os.environ["TUTORIAL_LIB_RAY_MARKS"] = str(marks_file)
    os.environ["RAY_TRAIN_CALLBACKS"] = "tests.benchmarks.ray_marks.Marks"
    with mock.patch.object(cluster, "start", timed_start):
        times["begin"] = time.time()
        run = launch.run(config)
        times["end"] = time.time()
    marks = {m["mark"]: m["time"] for m in map(json.loads, marks_file.read_text().splitlines())}
    first_step = run.directory.metrics_file.stat().st_mtime
    moments = [
        times["begin"],
        times["start"],
        times["started"],
        marks["controller runs"],
        marks["worker group starts"],
        marks["workers exist"],
        marks["training function called"],
        first_step - run.rows[0]["seconds"],
        first_step,
        times["end"],
    ]
    seconds = [after - before for before, after in pairwise(moments)]
    return {
        "seconds_to_first_step": first_step - times["begin"],
        "seconds_in_train_before_first_step": run.result["seconds_to_first_step"],
        "parts": dict(zip(PARTS, seconds, strict=True)),
    }
