"""Lesson 06's recording of a cluster, four parts of which must give the same results when they are repeated."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pytest

from tests.cluster import record
from tests.cluster.slurm_cluster import SlurmCluster
from tests.cluster.virtual_nodes import ROOT, VirtualNodes
from tests.distributed.cases.equivalence import MATRIX
from tutorial_lib.lab.scaling import recording

slow = pytest.mark.skipif(not MATRIX, reason="slow: only make matrix runs it")


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
def test_two_nodes_meet_over_their_network_and_fail_in_the_recorded_words_over_the_loopback(
    virtual_nodes: VirtualNodes,
) -> None:
    recorded, words = recording()["interfaces"], "connectFullMesh failed"
    assert words in recorded["lo"]
    assert words in record.meet_over(virtual_nodes, "lo")
    assert record.meet_over(virtual_nodes, "eth0") == recorded["eth0"] == "2 ranks met"


@slow
def test_the_lesson_submits_its_job_where_slurm_answers(cluster: SlurmCluster, shared: Path) -> None:
    """The lesson's kernel runs on the head node, so that its `--submit` reaches the real SLURM."""
    lesson = nbformat.read(ROOT / "notebooks" / "06_scaling_out.ipynb", as_version=4)
    needed = ("PROFILE = ", "import json", "if diagnose().scheduler")
    lesson.cells = [cell for cell in lesson.cells if cell.cell_type == "code" and cell.source.startswith(needed)]
    assert len(lesson.cells) == len(needed)
    lesson.cells[0].source += f"\nSTORAGE = {str(shared / 'submitted')!r}"
    nbformat.write(lesson, shared / "lesson.ipynb")
    cluster.run([sys.executable, "-m", "jupyter", "execute", "--inplace", str(shared / "lesson.ipynb")], timeout=200)
    outputs = nbformat.read(shared / "lesson.ipynb", as_version=4).cells[-1].outputs
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    (apart,) = re.findall(r"two nodes \(submitted here\) .* at most (\S+) of their size", said)
    assert float(apart) <= 1e-6
