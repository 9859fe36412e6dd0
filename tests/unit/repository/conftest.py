"""A checkout to set up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.unit.repository.files import ROOT


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a checkout without an environment, in a directory whose name has a space."""
    directory = tmp_path / "a clone"
    directory.mkdir()
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, directory)
    shutil.copytree(ROOT / ".ci", directory / ".ci")
    return directory
