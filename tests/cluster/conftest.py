"""SLURM cluster of two virtual nodes that all tests share, except those that break it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.requirements import missing_for_slurm, missing_tools, skip_for
from tests.cluster.slurm_cluster import SlurmCluster
from tests.cluster.virtual_nodes import VirtualNodes
from tests.distributed.cases import small_runs

TIMEOUT = 240

LONGEST_FIRST = ("test_ray.py", "test_slurm.py")
"""Files that run first, so that ``make cluster`` can spread the shorter ones evenly over its two pytest processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not any(item.iter_markers("timeout")):
            item.add_marker(pytest.mark.timeout(TIMEOUT))
    items.sort(key=lambda item: item.path.parent == here and item.path.name not in LONGEST_FIRST)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that all nodes see, as on a network file system."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def inputs(shared: Path) -> Path:
    """Return a directory with tiny models, which all nodes see."""
    small_runs.make_inputs(shared)
    return shared


@pytest.fixture(scope="session")
def virtual_nodes(shared: Path) -> Iterator[VirtualNodes]:
    """Start two virtual nodes."""
    skip_for(missing_tools())
    with VirtualNodes(2, [shared]) as started:
        yield started


@pytest.fixture(scope="session")
def cluster(virtual_nodes: VirtualNodes, shared: Path) -> SlurmCluster:
    """Start SLURM on the two nodes."""
    skip_for(missing_for_slurm())
    (shared / "slurm").mkdir()
    with SlurmCluster(virtual_nodes, shared / "slurm") as started:
        return started  # its daemons end with the nodes


@pytest.fixture
def cluster_to_break(virtual_nodes: VirtualNodes, shared: Path) -> Iterator[SlurmCluster]:
    """Start SLURM on two separate nodes, for a test that leaves them broken."""
    skip_for(missing_for_slurm())
    (shared / "slurm-to-break").mkdir()
    with VirtualNodes(2, [shared]) as own, SlurmCluster(own, shared / "slurm-to-break") as started:
        yield started
