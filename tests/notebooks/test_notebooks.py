"""The course itself: every notebook as it is committed, its claims read back as data; and what runs notebooks."""

from __future__ import annotations

import ast
import functools
import re
import statistics
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from tests.notebooks import run
from tutorial_lib.lab.claims import Claims, claims_in

ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/(home|root|tmp|Users|work|usr|opt|mnt)/|/site-packages/")
COURSE = pytest.mark.parametrize("notebook", run.committed_notebooks(), ids=lambda path: path.stem)
FIRST = pytest.mark.parametrize("notebook", run.committed_notebooks()[:1], ids=lambda path: path.stem)


@functools.cache
def executed(notebook: Path) -> run.Execution:
    return run.execute(notebook)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def outputs(document: NotebookNode) -> list[NotebookNode]:
    return [output for cell in run.code_cells(document) for output in cell.outputs]


def check_claims(found: list[dict[str, Any]]) -> None:
    """Every claim holds, and holds again when its numbers are compared anew."""
    assert found, "the notebook emits no claims"
    again = Claims()
    for claim in found:
        text, expected, measured = claim["claim"], claim["expected"], claim["measured"]
        if claim["relation"] == "equal":
            again.equal(text, expected, measured, tolerance=claim["tolerance"])
        elif claim["relation"] == "at least":
            again.at_least(text, expected, measured)
        elif claim["relation"] == "at most":
            again.at_most(text, expected, measured)
        else:
            again.check(text, claim["holds"], expected=expected, measured=measured)
    assert [claim for claim in found if claim["holds"] is not True] == []
    assert [claim for claim in again.to_list() if not claim["holds"]] == []


def test_there_is_a_course() -> None:
    names = [path.stem for path in run.committed_notebooks()]
    assert names[:2] == ["00_start_here", "01_zero_finetuning"]


# --- as committed -----------------------------------------------------------------------------------------------------


@COURSE
def test_committed_with_outputs_that_read_well_anywhere(notebook: Path) -> None:
    document = read(notebook)
    assert [cell.source for cell in run.code_cells(document) if cell.execution_count is None] == []
    assert [output for output in outputs(document) if output.output_type == "error"] == []
    assert [output.text for output in outputs(document) if output.get("name") == "stderr"] == []
    shown = [text for output in outputs(document) for text in (output.get("text"), *output.get("data", {}).values())]
    assert [text for text in shown if isinstance(text, str) and ABSOLUTE_PATH.search(text)] == []


@COURSE
def test_one_cell_of_literal_parameters(notebook: Path) -> None:
    """An injected parameter recomputes nothing, so what is derived from one must stand in a later cell."""
    (cell,) = [c for c in run.code_cells(read(notebook)) if "parameters" in c.metadata.get("tags", [])]
    values = {}
    for statement in ast.parse(cell.source).body:
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]  # type: ignore[attr-defined]
        values[target.id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
    assert isinstance(values["STORAGE"], str)


@COURSE
def test_cells_are_short(notebook: Path) -> None:
    lengths = [len(cell.source.splitlines()) for cell in run.code_cells(read(notebook))]
    assert statistics.median(lengths) <= 12
    assert max(lengths) <= 40


@COURSE
def test_committed_claims_hold(notebook: Path) -> None:
    check_claims(claims_in(notebook))


@COURSE
def test_shown_sources_are_those_of_the_library(notebook: Path) -> None:
    cells = run.code_cells(read(notebook))
    statements = [node for cell in cells for node in ast.parse(_without_magics(cell.source)).body]
    imports = [node for node in statements if isinstance(node, (ast.Import, ast.ImportFrom))]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(imports, type_ignores=[]), str(notebook), "exec"), names)
    for cell in cells:
        last = cell.source.strip().splitlines()[-1]
        if last.startswith("show_source("):
            (shown,) = [output.data for output in cell.outputs if output.output_type == "execute_result"]
            assert dict(shown) == eval(last, names)._repr_mimebundle_(), f"make execute: {last} shows older code"


def _without_magics(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


# --- as it runs now: the first, as `make run-notebooks` does with all; `make nbval` executes all ----------------------


@FIRST
def test_every_cell_runs(notebook: Path) -> None:
    done = executed(notebook)
    assert done.error is None, done.error
    document = read(done.output)
    assert [cell.source for cell in run.code_cells(document) if cell.execution_count is None] == []
    assert [output for output in outputs(document) if output.output_type == "error"] == []


@FIRST
def test_its_claims_hold_again(notebook: Path) -> None:
    done = executed(notebook)
    assert done.error is None, "see test_every_cell_runs"
    found = claims_in(done.output)
    check_claims(found)
    assert [claim["claim"] for claim in found] == [claim["claim"] for claim in claims_in(notebook)]


@FIRST
def test_its_wall_time_is_recorded(notebook: Path) -> None:
    done = executed(notebook)
    run.record([done])
    assert done.seconds > 0
