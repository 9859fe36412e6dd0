"""A user's own training loop on local ranks, passed as a function."""

from __future__ import annotations

import pytest

from tests.distributed.cases import small_runs
from tests.support.models import MODELS, small_model
from tutorial_lib import launch
from tutorial_lib.config import ConfigError
from tutorial_lib.lab.scripts import restore_bytes, train_zero
from tutorial_lib.records import RunDirectory


def config(directory, **changes):
    flat = {"model": "gpt2", "max_examples": 40, "steps": 4, "dp": 2, "engine": "fsdp", "name": "loop"}
    return small_runs.config(directory, **(flat | changes))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run-loop")
    small_model("gpt2", directory / "gpt2", **MODELS["gpt2"])
    return directory


def test_every_rank_calls_the_loop_and_rank_0s_result_is_returned(directory):
    started = config(directory, stop_after=2)
    losses = launch.run_loop(train_zero.train_loop, started)
    reference = launch.run(config(directory, name="reference", engine="torch", dp=1, launcher="none"))
    assert losses == pytest.approx([row["loss"] for row in reference.rows][:2], rel=1e-6)
    assert "step    2  loss" in RunDirectory(started.directory).log_file(0).read_text()
    assert len(launch.run_loop(restore_bytes.count_bytes, started)) == 2
    assert losses + launch.run_loop(train_zero.train_loop, config(directory)) == pytest.approx(
        [row["loss"] for row in reference.rows], rel=1e-6
    )


def test_a_loop_that_fails_shows_its_own_error(directory):
    with pytest.raises(launch.WorkerError, match="keep_best=True compares evaluation losses"):
        launch.run_loop(train_zero.train_loop, config(directory, name="fails", keep_best=True, evaluate=True))


def test_a_loop_without_a_file_is_refused(directory):
    names: dict = {}
    exec(compile("def loop(settings): ...", "<cell>", "exec"), names)
    with pytest.raises(ConfigError, match=r"can import \(here <cell>\)\. Put the loop in a \.py file"):
        launch.run_loop(names["loop"], config(directory, name="refused"))
    with pytest.raises(ConfigError, match=r"launcher='local' \(here 'ray'\)"):
        launch.run_loop(train_zero.train_loop, config(directory, name="refused", launcher="ray"))
