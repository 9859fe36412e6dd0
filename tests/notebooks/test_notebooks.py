"""Committed notebooks of the course, with their claims read back as data. `make nbval` runs them again."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from tests.notebooks import run
from tests.notebooks.same_claims import describe_untrue
from tutorial_lib.lab.claims import claims_in

ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/(home|root|tmp|Users|work|usr|opt|mnt)/|/site-packages/")
COURSE = pytest.mark.parametrize("notebook", run.committed_notebooks(), ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def outputs(document: NotebookNode) -> list[NotebookNode]:
    return [output for cell in run.code_cells(document) for output in cell.outputs]


def test_the_first_lessons_are_found() -> None:
    names = [path.stem for path in run.committed_notebooks()]
    assert names[:2] == ["00_start_here", "01_zero_finetuning"]
    assert len(set(names)) == len(names), "a run's folder is named after its notebook"


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
    """An injected parameter recomputes nothing, so values derived from one must be in a later cell."""
    (cell,) = [c for c in run.code_cells(read(notebook)) if "parameters" in c.metadata.get("tags", [])]
    values = {}
    for statement in ast.parse(cell.source).body:
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]  # type: ignore[attr-defined]
        values[target.id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
    assert values["STORAGE"] == f"runs/{notebook.stem}", "two notebooks in one directory would remove each other's runs"


@COURSE
def test_cells_are_short(notebook: Path) -> None:
    lengths = [len(cell.source.splitlines()) for cell in run.code_cells(read(notebook))]
    assert statistics.median(lengths) <= 12
    assert max(lengths) <= 40


@COURSE
def test_a_machines_gpu_is_used_only_if_the_profile_says_so(notebook: Path) -> None:
    """Scripts take a GPU that they see, and ``fully_shard`` without a mesh takes one if PyTorch is built for GPUs."""
    cells = [_without_magics(cell.source) for cell in run.code_cells(read(notebook))]
    calls = [node for cell in cells for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Call)]
    sharding = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "fully_shard"]
    assert [ast.unparse(call) for call in sharding if "mesh" not in [keyword.arg for keyword in call.keywords]] == []
    if "torch.distributed.run" in "".join(cells) or "import hangs, torchrun" in "".join(cells):
        first = next(cell for cell in cells if "launch.warm_up(" in cell)  # the ranks get this process's environment
        assert 0 < first.find("set_visible_gpus(PROFILE)") < first.find("launch.warm_up(")


@COURSE
def test_imports_come_before_slow_cells(notebook: Path) -> None:
    """A reader who starts in the middle after a restart must not train for a minute and then get a NameError."""
    bodies = [ast.parse(_without_magics(cell.source)).body for cell in run.code_cells(read(notebook))]
    importing = [n for n, body in enumerate(bodies) if any(isinstance(s, (ast.Import, ast.ImportFrom)) for s in body)]
    assert importing == list(range(1, 1 + len(importing))), "imports must follow the parameters"


def test_the_readme_lists_every_lesson_and_lab_with_the_minutes_that_reading_takes() -> None:
    """Reading takes one minute per 200 words, and 24 seconds per code cell."""
    readme = (run.ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(
        r"^\| \[[^]]+\]\(notebooks/([\w/]+)\.ipynb\) \|.*\| (\d+) min \| \d+ s \|$", readme, re.MULTILINE
    )
    there = {path.relative_to(run.NOTEBOOKS).with_suffix("").as_posix(): path for path in run.committed_notebooks()}
    assert listed == [(name, str(_minutes(read(path)))) for name, path in there.items()]


def _minutes(document: Any) -> int:
    words = sum(len(cell.source.split()) for cell in document.cells if cell.cell_type == "markdown")
    return round(words / 200 + 0.4 * len(run.code_cells(document)))


@COURSE
def test_titles_name_no_value_of_a_parameter(notebook: Path) -> None:
    """A reader may change parameters, and a fixed "over 30 steps" would then be false."""
    cells = run.code_cells(read(notebook))
    (given,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    values = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(given.source).body}  # type: ignore[attr-defined]
    fixed = [f"{values[name]} {what}" for name, what in COUNTED.items() if name in values]
    if "DP" in values:
        fixed += [f"{NUMBERS[values['DP'] * values['TP']]} {what}" for what in ("ranks", "Ray workers")]
        fixed += [f"{values['DP'] * values['TP']} {what}" for what in ("ranks", "Ray workers")]
    titles = [text for cell in cells for text in _titles(cell.source)]
    assert [text for text in titles if any(each in text for each in fixed)] == []


COUNTED = {"STEPS": "steps", "NUM_RANKS": "ranks", "RANKS": "ranks", "NUM_WORKERS": "workers"}
NUMBERS = ("no", "one", "two", "three", "four")


def _titles(source: str) -> list[str]:
    """Return the literal parts of the titles and descriptions of a cell's figures, tables and progress lines."""
    calls = [node for node in ast.walk(ast.parse(_without_magics(source))) if isinstance(node, ast.Call)]
    values = [word.value for call in calls for word in call.keywords if word.arg in ("title", "alt", "caption")]
    return [
        part.value
        for value in values
        for part in ast.walk(value)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


@COURSE
def test_tables_fit_on_a_page_with_their_numbers_on_the_right(notebook: Path) -> None:
    """A column of numbers with the word "none" in it would be aligned like text; None shows as a dash."""
    pages = [output.get("data", {}).get("text/html", "") for output in outputs(read(notebook))]
    for table in [page for page in pages if "<table" in page]:
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
        columns = list(zip(*rows, strict=False))
        assert len(columns) <= MOST_COLUMNS, rows[0]
        for title, *cells in columns:
            words = {cell for cell in cells if not re.fullmatch(r"[-\d.,e+]+", cell)}
            assert not words <= {"none", "None", "n/a"} or not words, f"{title}: {words} among numbers"


MOST_COLUMNS = 10
"""With fifteen, a table of one row was cut off at the right edge of JupyterLab's page."""


@COURSE
def test_relative_links_lead_to_files(notebook: Path) -> None:
    text = "\n".join(cell.source for cell in read(notebook).cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert [target for target in targets if not (notebook.parent / target).exists()] == []


@COURSE
def test_committed_claims_hold(notebook: Path) -> None:
    found = claims_in(notebook)
    assert found
    assert describe_untrue(found) == []


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
