"""A copy of an embedded model, for tests that change its files."""

import shutil

import pytest

from tutorial_lib.embedded import model_directory


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(model_directory("embedded/gpt2"), tmp_path / "model")
