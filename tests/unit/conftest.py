"""A run's directory; and a small model and a run of it, created once for all tests."""

import pytest

from tutorial_lib.records import RunDirectory


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create()
    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from tests.support.torch_runs import make_model  # most tests do not need what this imports

    return make_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def uninterrupted(model, tmp_path_factory):
    """Run our own loop on plain torch."""
    from tests.support.torch_runs import config
    from tutorial_lib import launch

    return launch.run(config(tmp_path_factory.mktemp("uninterrupted"), model=model))
