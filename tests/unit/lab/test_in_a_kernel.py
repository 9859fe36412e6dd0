"""Notebook tools in a real kernel: claims, live curves, figures and sources."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tutorial_lib.lab.claims import claims_in

ROOT = Path(__file__).parents[3]


CELLS = [
    """
from tutorial_lib.lab import figures, sources
from tutorial_lib.lab.claims import Claims
from tutorial_lib.lab.progress import LiveCurve, StatusLine, progress
rows = [{"step": s, "loss": 6 - s / 100, "tokens": 1000, "seconds": 0.5} for s in range(1, 41)]
""",
    """
shown = progress(40, title="ZeRO-3")
assert type(shown) is LiveCurve
shown.interval = 0
with shown:
    for row in rows:
        if row["step"] % 10 == 0:
            shown.on_rows(rows[row["step"] - 10:row["step"]])
""",
    "figures.loss_curves({'a': rows}, title='The loss falls', alt='A falling line.')",
    "sources.show_source(Claims.at_least)",
    """
claims = Claims()
claims.equal("forty rows", 40, len(rows))
claims.at_most("the loss fell", 6, rows[-1]["loss"])
claims.show()
""",
    """
with progress(10, title="stages", labels=list("abcde"), curve=False) as shown:
    for run in range(5):
        shown.on_rows(rows[:10])
""",
    r"""
import re, time
from unittest import mock
said = []
listen = mock.patch.object(StatusLine, "show_bundle", lambda self, data, metadata=None: said.append(data["text/plain"]))
def comes(pattern):
    # Wait up to ten seconds for such a text, without a new row.
    end = time.monotonic() + 10
    while not any(re.search(pattern, s) for s in said) and time.monotonic() < end:
        time.sleep(0.1)
    print(any(re.search(pattern, s) for s in said))
curve, line = LiveCurve(40, title="slow", interval=0.2), progress(10, title="two", labels=["a", "b"], curve=False)
with listen, curve:
    comes(r"slow: starting processes \.\.\. [1-9]")  # a busy machine may skip a second
    curve.on_rows(rows[:5])
    curve.on_rows(rows[5:12])  # too soon after the last drawing, and no rows follow
    comes("step 12 of 40")
with listen, line:
    line.on_rows(rows[:10])
    comes(r"run 2 of 2, b: starting \.\.\. [2-9]")
""",
    """
with progress(40, title="again"):
    pass
""",
    """
try:
    with progress(40, title="broken"):
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
""",
]


def execute(cells: list[str], path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    try:
        NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(ROOT)}}).execute()
    finally:
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("notebook") / "lesson.ipynb"
    execute(CELLS, path)
    return path


def outputs_of(path: Path, cell: int) -> list[Any]:
    return list(nbformat.read(path, as_version=4).cells[cell].outputs)


def test_claims_travel_in_the_executed_notebook(executed: Path) -> None:
    first, second = claims_in(executed)
    assert first == {
        "claim": "forty rows", "relation": "equal", "expected": 40, "measured": 40, "tolerance": 0.0,
        "difference": 0.0, "holds": True, "relative": None, "varies": False, "made": 1,
    }  # fmt: skip
    assert (second["relation"], second["expected"], second["measured"]) == ("at most", 6, 5.6)
    [output] = outputs_of(executed, 4)
    assert "2 of 2 claims hold" in output.data["text/html"] and "forty rows" in output.data["text/plain"]


def test_a_live_curve_leaves_one_final_figure(executed: Path) -> None:
    outputs = outputs_of(executed, 1)
    assert [o.output_type for o in outputs] == ["display_data"]
    assert outputs[0].data["text/plain"].startswith("ZeRO-3: loss 5.990 to 5.600 at step 40\n")
    alt = "Training loss over optimizer steps. ZeRO-3: 5.990 at step 1, 5.600 at step 40."
    assert outputs[0].metadata["image/png"]["alt"] == alt
    assert base64.b64decode(outputs[0].data["image/png"]).startswith(b"\x89PNG")


def test_many_runs_leave_one_line(executed: Path) -> None:
    assert [o.data["text/plain"] for o in outputs_of(executed, 5)] == ["stages: 5 runs, 50 steps"]


def test_progress_shows_seconds_and_the_latest_rows_while_waiting(executed: Path) -> None:
    shown = "".join(o.text for o in outputs_of(executed, 6) if o.output_type == "stream")
    assert shown.split() == ["True"] * 3


def test_a_run_without_a_new_step_says_so(executed: Path) -> None:
    """A complete run has nothing left to train, so its line must not go on saying "starting processes"."""
    assert [o.data["text/plain"] for o in outputs_of(executed, 7)] == ["again: no step was left to train"]
    assert [o.data["text/plain"] for o in outputs_of(executed, 8)] == ["broken: no step, KeyboardInterrupt"]


def test_figures_and_sources_display_themselves(executed: Path) -> None:
    [figure], [source] = outputs_of(executed, 2), outputs_of(executed, 3)
    assert figure.metadata["image/png"] == {"alt": "A falling line.", "width": 504, "height": 259}
    assert figure.data["text/plain"] == "The loss falls\nA falling line."
    assert "def at_least" in source.data["text/plain"] and "<pre" in source.data["text/html"]


def test_a_false_claim_stops_the_notebook_after_showing_it(tmp_path: Path) -> None:
    path = tmp_path / "false.ipynb"
    cell = "from tutorial_lib.lab.claims import Claims\nc = Claims()\nc.equal('two', 2, 3)\nc.show()"
    with pytest.raises(CellExecutionError, match="1 of 1 claims do not hold"):
        execute([cell], path)
    assert [c["holds"] for c in claims_in(path)] == [False]


def test_a_notebook_without_claims_has_none(tmp_path: Path) -> None:
    path = tmp_path / "empty.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("text")]), path)
    assert claims_in(path) == []
