"""Step 7: the workshop's exercises for one GPU, which a reader runs with ``bench`` and the Hugging Face ``Trainer``.

Each row starts its own process through the local launcher and watches its memory from outside. Every question is padded
to 512 tokens, as in the workshop. ``baseline, fp16`` is the workshop's own baseline; all other rows run in bf16.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from functools import partial
from typing import Any

from tests.gpu.cases import Cases, Setting
from tutorial_lib import bench
from tutorial_lib.config import Config

ROWS = [f"{stage}Z{offload}-1G1N" for stage in (1, 2, 3) for offload in ("", "O")] + ["2ZOP-1G1N"]


def cases(setting: Setting) -> Cases:
    """Return this module's measurements: the baseline first, then one GPU by stage, with and without offload."""
    rows = setting.pick(full=ROWS, quick=ROWS[-1:], tiny=ROWS[3:4])
    found: Cases = {"baseline": partial(run_row, setting, "baseline", steps=31, evaluate_every="epoch")}
    if setting.device == "cuda":  # fp16 is refused on a CPU
        found["baseline, fp16"] = partial(run_row, setting, "baseline", precision="fp16", steps=31, evaluate=False)
    for row in rows:
        found[row] = partial(run_row, setting, row, steps=10, evaluate=False)
    return found


def run_row(setting: Setting, row: str, **flat: Any) -> dict[str, Any]:
    """Run one row of the workshop's table, and return its record with every step's loss and seconds."""
    name = f"{row}-{flat.get('precision', 'bf16')}"
    if setting.tiny:
        flat |= {"steps": 4, "seq_length": 96, "max_eval_examples": 4}
    config = Config.create(
        "gpu",
        **{
            "device": setting.device, "launcher": "local", "storage": str(setting.path("table")), "name": name,
            "engine": "trainer", "model": "embedded/bloom" if setting.tiny else "published/bloom-560m",
            "random_init": not setting.tiny, "dataset": "embedded/qa", "seq_length": 512, "batching": "max_length",
            "global_batch": 16, "micro_batch": 4, "learning_rate": 5e-5, "schedule": "constant", "dp": 1,
            "max_examples": 500, "max_eval_examples": 50, "resume": "never", **flat,
        },
    )  # fmt: skip
    with suppress(ImportError):  # figures need matplotlib, but the row is recorded before they are drawn
        bench.run_matrix("zero-stages", config, rows=[row], sample_interval=0.1)
    matrix = bench.Matrix.read(config.directory)
    record = matrix[row]
    if not record.is_done:
        raise RuntimeError(f"{record.status}: {record.cause}\n{record.error}")
    steps = matrix.run_directory(row).rows()
    shutil.rmtree(matrix.path, ignore_errors=True)
    return {
        "settings": record.settings,
        "step_seconds": [step["seconds"] for step in steps],
        "step_losses": [step["loss"] for step in steps],
        "row": record.to_dict(),
    }
