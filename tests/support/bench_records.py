"""Rows and runs for the tests of benchmark matrices, made without training."""

from __future__ import annotations

import json
from typing import Any

from tutorial_lib.bench.record import DONE, RowRecord
from tutorial_lib.config import Config
from tutorial_lib.launch import Run
from tutorial_lib.measure.memory_log import MIB, MemorySummary
from tutorial_lib.records import RunDirectory
from tutorial_lib.theory.memory import ModelStates

STEPS = 5


def done(name: str, **values: Any) -> RowRecord:
    """Return a finished row with a peak memory of 1 GiB, 10 samples per second, and 2 s of training."""
    tree = MemorySummary("PSS", 1024 * MIB, 900.0 * MIB, (890 * MIB,), 10)
    states = (ModelStates(40 * MIB, 40 * MIB, 80 * MIB),)
    own = {
        "status": DONE, "process_tree": tree, "states": states, "predicted_states": states, "train_seconds": 2.0,
        "samples_per_second": 10.0, "step_seconds": 0.4, "train_loss": 3.5, "eval_losses": (3.25, 3.0), "world_size": 1,
        "num_steps": STEPS, "steps_per_epoch": 8, "peak_bytes": int(35.1 * MIB), "predicted_peak_bytes": 34.8 * MIB,
    }  # fmt: skip
    return RowRecord(name, **(own | values))


def leave_run(config: Config, **result: Any) -> Run:
    """Write the files of a completed run, and return it."""
    directory = RunDirectory(config.directory)
    directory.create()
    directory.config_file.write_text(config.to_json())
    for step in range(1, STEPS + 1):
        seconds = {1: 3.0, 3: 0.8}.get(step, 0.4)
        directory.append({"step": step, "loss": 4.0 - step / 10, "tokens": 100, "seconds": seconds})
    account = {"parameters": 400, "gradients": 400, "optimizer": 800, "by_device": {"cpu": 1600}}
    measured = {"step": 3, "state_bytes": account, "peak_bytes": {"cpu": 500}}
    own = {
        "status": "completed", "num_steps": STEPS, "steps_per_epoch": 8, "train_loss": 3.5, "eval_loss": 3.0,
        "eval_losses": [], "eval_samples_per_second": 20.0,
        "num_parameters": 100, "ranks": [{"measured": measured}] * config.parallel.world_size,
    }  # fmt: skip
    directory.result_file.write_text(json.dumps(own | result))
    return Run(config, directory.result(), directory.rows())
