"""Notebook runner: the notebooks that it runs, the files that it keeps, and its message when a cell fails."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.notebooks import run


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the runner use a temporary directory instead of the repository, and return its notebooks/."""
    for name, directory in {"ROOT": "", "NOTEBOOKS": "notebooks", "RESULTS": "build/notebooks"}.items():
        monkeypatch.setattr(run, name, tmp_path / directory)
    run.NOTEBOOKS.mkdir()
    return run.NOTEBOOKS


def write(directory: Path, name: str, *sources: str) -> Path:
    cells = [new_markdown_cell("# A lesson"), new_code_cell('STORAGE = "runs"', metadata={"tags": ["parameters"]})]
    document = new_notebook(cells=cells + [new_code_cell(source) for source in sources])
    path = directory / f"{name}.ipynb"
    nbformat.write(document, path)
    return path


LEAVES_A_TRACE = """
from pathlib import Path
found = Path(STORAGE).exists(), [path.name for path in Path.cwd().iterdir()]
Path(STORAGE).mkdir()
found
"""


def test_every_run_starts_in_an_empty_directory(course: Path) -> None:
    path = write(course, "00_one", LEAVES_A_TRACE)
    committed = path.read_text()
    for _ in range(2):
        done = run.execute(path)
        assert done.error is None
        last = nbformat.read(done.output, as_version=4).cells[-1]
        assert last.outputs[0].data["text/plain"] == "(False, [])"
    assert path.read_text() == committed


def test_the_failing_cell_is_named_and_the_rest_of_the_course_not_run(
    course: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(course, "00_one", "1 / 0", "print('not reached')")
    write(course, "01_two")
    assert run.main([]) == 1
    printed = capsys.readouterr().out
    assert "00_one failed: cell 3 raised ZeroDivisionError: division by zero" in printed
    assert "----> 1 1 / 0" in printed
    assert "01_two" not in printed
    (row,) = json.loads((run.RESULTS / "times.json").read_text())
    assert row["notebook"] == "00_one"
    assert row["seconds"] > 0


def test_a_hanging_cell_ends(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CELL_TIMEOUT", 1)
    done = run.execute(write(course, "00_one", "import time; time.sleep(60)"))
    assert done.error is not None
    assert "timed out while it was being executed, after 1 seconds" in done.error
    assert done.seconds < 30


def test_in_place_keeps_only_reproducible_outputs(course: Path) -> None:
    path = write(course, "00_one", LEAVES_A_TRACE, "STORAGE")
    assert run.main(["--in-place"]) == 0
    first = path.read_text()
    assert run.main(["--in-place"]) == 0
    assert path.read_text() == first
    document = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in run.code_cells(document)] == [1, 2, 3]
    assert document.cells[-1].outputs[0].data["text/plain"] == "'runs'"
    assert str(course.parent) not in first


def test_finding_no_notebook_is_an_error(course: Path) -> None:
    assert run.main([]) == 1
