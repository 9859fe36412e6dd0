"""Step 6: how long training waits for a checkpoint of a 1 B-parameter model, and how much of the save is hidden.

One run of the trainer saves twice: in the middle, while training continues (``async_save``), and at the end, when the
trainer waits for the files.
"""

from __future__ import annotations

import shutil
import statistics
from typing import Any

from tests.gpu.activation_memory import one_billion
from tests.gpu.cases import Cases, Setting
from tests.gpu.data import write_rows
from tests.gpu.older_versions import adapt
from tests.gpu.training import join_group
from tests.gpu.workshop import configure
from tutorial_lib import trainer
from tutorial_lib.records import RunDirectory


def cases(setting: Setting) -> Cases:
    """Return this module's measurements."""
    return {"fsdp": lambda: save_twice(setting)}


def save_twice(setting: Setting) -> dict[str, Any]:
    """Train with a save in the middle and one at the end, and return stalls, hidden time and step times around them."""
    adapted = adapt()
    model = one_billion(setting)
    middle = setting.pick(full=120, quick=60, tiny=4)
    config = configure(
        setting, model, name="async", engine="fsdp", storage=str(setting.path("runs")), resume="never",
        dataset=write_rows(setting.path("rows")), batching="max_length", micro_batch=4, global_batch=4,
        seq_length=setting.pick(full=512, quick=512, tiny=16), checkpoint_every=middle, steps=2 * middle - 1,
        async_save=True, evaluate=False,
    )  # fmt: skip
    join_group(config)
    result = trainer.train(config)
    rows = RunDirectory(config.directory).rows()
    shutil.rmtree(config.directory)
    behind, at_end = result.saves
    during, elapsed = [], 0.0
    for row in rows[middle:]:
        elapsed += row["seconds"]
        if elapsed <= behind["write_seconds"]:
            during.append(row["seconds"])
    return {
        "num_params": result.num_parameters,
        "adapted_to_older_versions": adapted,
        "checkpoint_bytes": behind["bytes"],
        "async_stall_seconds": behind["stall_seconds"],
        "async_write_seconds": behind["write_seconds"],
        "hidden_seconds": behind["write_seconds"] - behind["stall_seconds"],
        "waiting_stall_seconds": at_end["stall_seconds"],
        "step_seconds_before": statistics.median(row["seconds"] for row in rows[1:middle]),
        "step_seconds_while_writing": statistics.median(during) if during else None,
        "steps_while_writing": len(during),
        "steps_after_the_save": len(rows) - middle,
    }
