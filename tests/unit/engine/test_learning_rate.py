"""Learning-rate schedules: each rises through its warm-up, whichever loop trains."""

from __future__ import annotations

import pytest

from tutorial_lib.config import Config
from tutorial_lib.records import RunDirectory
from tutorial_lib.trainer import train


@pytest.mark.parametrize("engine", ["torch", "trainer"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_schedule_begins_with_its_warm_up(tmp_path, schedule, engine):
    config = Config.create(
        "cpu", storage=str(tmp_path), launcher="none", engine=engine, dp=1, global_batch=1, seq_length=16, steps=5,
        max_examples=4, evaluate=False, learning_rate=1e-3, schedule=schedule, warmup_steps=4,
    )  # fmt: skip
    train(config)
    rates = [row["lr"] for row in RunDirectory(config.directory).rows()]
    assert rates == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
