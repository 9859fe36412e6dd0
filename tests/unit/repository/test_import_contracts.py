"""Import contracts between the packages: the check notices a forbidden import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.repository.files import ROOT


@pytest.mark.parametrize(
    "module, forbidden, contract",
    [
        ("config/__init__", "from tutorial_lib import records", "config imports no other package"),
        ("theory/memory", "import torch", "theory is arithmetic"),
        ("theory/memory", "from tutorial_lib import config", "theory is arithmetic"),
        ("trainer/loop", "import deepspeed", "only engine.deepspeed and checkpoint.formats"),
        ("models/loading", "import ray", "only launch.ray imports Ray"),
        ("records", "from tutorial_lib.launch import local", "only bench and cli import launch"),
        ("lab/claims", "from tutorial_lib import trainer", "lab reads records and theory"),
        ("models/loading", "from tutorial_lib import trainer", "packages import only from the layers below"),
    ],
)
def test_a_forbidden_import_is_seen(tmp_path: Path, module: str, forbidden: str, contract: str) -> None:
    """`make lint` checks the contracts. This test breaks most of them, to show that the check still works."""
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json")
    shutil.copytree(ROOT / "tutorial_lib", tmp_path / "tutorial_lib", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "tutorial_lib" / f"{module}.py").open("a") as file:
        file.write(f"\n{forbidden}\n")
    lint = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    run = subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, NO_COLOR="1"))
    broken = [line for line in run.stdout.splitlines() if line.endswith("BROKEN")]
    assert run.returncode == 1
    assert any(line.startswith(contract) for line in broken)
