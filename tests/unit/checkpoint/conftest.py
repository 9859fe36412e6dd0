"""Stopped runs, created once for the tests of checkpoints."""

import shutil
from dataclasses import replace

import pytest

from tests.support.torch_runs import config
from tutorial_lib import launch


@pytest.fixture(scope="session")
def stopped(model, tmp_path_factory):
    """Run the settings of ``uninterrupted``, but stop after step 4, with a checkpoint at step 2 as well."""
    return launch.run(config(tmp_path_factory.mktemp("stopped"), model=model, stop_after=4, checkpoint_every=2))


@pytest.fixture
def interrupted(stopped, tmp_path):
    """Return a copy of the stopped run, to damage or resume."""
    run = replace(stopped, config=stopped.config.override(storage=str(tmp_path)))
    shutil.copytree(stopped.directory.path, run.directory.path)
    return run
