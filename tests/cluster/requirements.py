"""Requirements of the cluster tests: Linux, root, namespaces, and SLURM's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.cluster.slurm_cluster import find_program
from tests.cluster.virtual_nodes import UNSHARE

TOOLS = ("unshare", "nsenter", "ip", "mount", "bash")
PACKAGES = {"slurm-wlm": ("slurmctld", "slurmd", "sbatch", "squeue"), "munge": ("munged",)}


def skip_for(reason: str | None) -> None:
    """Skip a test that cannot run here. In continuous integration, this is an error."""
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    if reason:
        pytest.skip(reason)


def missing_tools() -> str | None:
    """Return why this machine cannot have virtual nodes, or None if it can."""
    if sys.platform != "linux":
        return "virtual nodes need Linux"
    if os.geteuid() != 0:
        return "virtual nodes need root (sudo -E make cluster)"
    if absent := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"virtual nodes need {', '.join(absent)} (`make cluster-tools` installs iproute2 and util-linux)"
    attempt = subprocess.run(
        [*UNSHARE, "--net", "ip", "link", "add", "name", "bridge", "type", "bridge"], capture_output=True
    )
    if attempt.returncode:
        return f"this machine does not allow namespaces: {attempt.stderr.decode().strip()}"
    return None


def missing_packages() -> list[str]:
    """Return the packages that are not installed."""
    return [name for name, tools in PACKAGES.items() if not all(find_program(tool) for tool in tools)]


def missing_for_slurm() -> str | None:
    """Return why this machine cannot have a SLURM cluster, or None if it can."""
    if (absent := missing_packages()) and not missing_tools():
        return f"SLURM on virtual nodes needs {' and '.join(absent)}: `make cluster-tools` installs them"
    return missing_tools()
