"""Lesson 06's recording of a cluster: its parts give the same results again on a real SLURM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import record
from tests.cluster.nodes import VirtualNodes
from tests.cluster.slurm import SlurmCluster
from tests.distributed.cases import MATRIX
from tutorial_lib.lab.scaling import recording

slow = pytest.mark.skipif(not MATRIX, reason="make matrix repeats the whole recording; the other test needs seconds")


def test_srun_sets_the_recorded_variables(cluster: SlurmCluster, shared: Path) -> None:
    assert record.variables_of_srun(cluster, shared) == recording()["srun"]


@slow
def test_the_lessons_script_finds_and_computes_what_was_recorded(
    cluster: SlurmCluster, shared: Path, tmp_path: Path
) -> None:
    directory = shared / "lesson"
    directory.mkdir()
    for now, then in zip(record.lesson_on_two_nodes(cluster, directory), recording()["torchrun"], strict=True):
        assert now["found"] == then["found"]
        assert now["losses"] == pytest.approx(then["losses"], rel=1e-5)


@slow
def test_the_lessons_job_takes_the_recorded_steps(cluster: SlurmCluster, shared: Path) -> None:
    directory = shared / "job"
    directory.mkdir()
    assert record.undisturbed(cluster, directory) == pytest.approx(recording()["undisturbed"], rel=1e-6)


@slow
def test_gloo_over_the_loopback_fails_in_the_recorded_words(virtual_nodes: VirtualNodes) -> None:
    words = "connectFullMesh failed"
    assert words in recording()["wrong_interface"]
    assert words in record.wrong_interface(virtual_nodes)
