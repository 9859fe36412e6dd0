"""Notebook tools: claims that can fail, reproducible figures, sources, progress, pictures."""

from __future__ import annotations

import base64
import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from matplotlib import image as png
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tutorial_lib.lab import claims as claims_module
from tutorial_lib.lab import display, figures, images, sources
from tutorial_lib.lab.claims import MIME_TYPE, Claims, claims_in
from tutorial_lib.lab.progress import LiveCurve, LogLines, TerminalBar, progress
from tutorial_lib.theory import memory

ROOT = Path(__file__).parents[2]


def metrics(steps: int, start: int = 1) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 6 - step / 100, "tokens": 1000, "seconds": 0.5} for step in range(start, start + steps)
    ]


# --- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "measured", "tolerance", "holds"),
    [
        (1.0, 1.0, 0.0, True),
        (1.0, 1.0 + 1e-7, 0.0, False),
        (1.0, 1.0 + 1e-7, 1e-6, True),
        (1.0, 1.0 + 1.1e-6, 1e-6, False),
        (139840, 139840, 0.0, True),
        (139840, 139841, 0.0, False),
        (2**60, 2**60, 0.0, True),
        ([1.0, 2.0], (1.0, 2.0 + 1e-7), 1e-6, True),
        ([1.0, 2.0], [1.0, 2.1], 1e-6, False),
        ([1.0, 2.0], [1.0], 1.0, False),
        ([1.0], 1.0, 1.0, False),
        ([[1.0], [2.0]], [[1.0], [2.0]], 0.0, True),
        ("a", "a", 0.0, True),
        ("a", "b", 9.0, False),
        (True, True, 0.0, True),
        (math.nan, math.nan, math.inf, False),
        ([1.0, 2.0], [1.0, math.nan], math.inf, False),
        (math.inf, math.inf, 0.0, True),
        (np.float32(1), np.float64(1), 0.0, True),
        (None, None, 0.0, True),
        (1.0, None, 1.0, False),
    ],
)
def test_equality_within_a_tolerance(expected: Any, measured: Any, tolerance: float, holds: bool) -> None:
    claims = Claims()
    claims.equal("text", expected, measured, tolerance=tolerance)
    assert claims.to_list()[0]["holds"] is holds


def test_each_claim_is_printed_as_it_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    claims = Claims(print_each=True)
    claims.equal("losses", [1.0, 2.0], [1.0, 2.0000001], relative=1e-6)
    claims.equal("names that differ", [], [])
    claims.at_most("largest difference", 1e-6, 2e-6)
    claims.check("it is refused", True)
    assert capsys.readouterr().out.splitlines() == [
        "✓ losses: 1, 2 = 1, 2 within 1e-06 of expected",
        "✓ names that differ: none = none",
        "✗ largest difference: 2e-06 ≤ 1e-06",
        "✓ it is refused: yes",
    ]


def test_relative_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    claims = Claims()
    claims.equal("inside", 200.0, 201.9, relative=0.01)
    claims.equal("outside", 200.0, 202.1, relative=0.01)
    inside, outside = claims.to_list()
    assert (inside["holds"], outside["holds"]) == (True, False)
    assert inside["tolerance"] == 2.0 and inside["difference"] == pytest.approx(1.9)
    assert (inside["relative"], outside["relative"]) == (0.01, 0.01)
    with pytest.raises(AssertionError, match=r"off by 2\.1 with tolerance 0\.01 of expected"):
        claims.show()
    assert capsys.readouterr().out.count("0.01 of expected") == 2
    with pytest.raises(ValueError, match="not both"):
        claims.equal("both", 1.0, 1.0, tolerance=0.1, relative=0.1)


def test_bounds_and_conditions() -> None:
    claims = Claims()
    claims.at_least("enough", 5, 5.0)
    claims.at_least("not enough", 5, 4.9)
    claims.at_least("not a number", 5, math.nan)
    claims.at_most("at most", 5, 5)
    claims.at_most("too much", 5, 5.1)
    claims.at_most("nor a number", 5, math.nan)
    claims.check("so", True, measured="seen")
    claims.check("not so", False)
    claims.check("NaN is true in Python", math.nan)  # type: ignore[arg-type]
    assert [c["holds"] for c in claims.to_list()] == [True, False, False, True, False, False, True, False, False]


def test_show_names_every_claim_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    claims = Claims()
    claims.equal("one is one", 1, 1)
    claims.equal("losses agree", [1.0, 2.0], [1.0, 2.5], tolerance=1e-6)
    claims.at_least("five times faster", 5, 4.2)
    with pytest.raises(AssertionError) as raised:
        claims.show()
    message = str(raised.value)
    assert "2 of 3 claims do not hold" in message and "one is one" not in message
    assert "losses agree: expected = 1, 2, measured 1, 2.5, off by 0.5 with tolerance 1e-06" in message
    assert "five times faster: expected ≥ 5, measured 4.2" in message
    shown = capsys.readouterr().out
    assert shown.count("✗ does not hold") == 2 and shown.count("✓") == 1


def test_claims_that_hold_are_shown_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    claims = Claims()
    claims.equal("ZeRO-3 gives the reference's loss", 6.255393, 6.2553931, tolerance=1e-6)
    claims.show()
    assert "ZeRO-3 gives the reference's loss  = 6.255393  6.255393  1e-06      ✓" in capsys.readouterr().out


def test_a_number_that_varies_is_shown_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    claims = Claims()
    claims.at_most("seconds", 5, 4.25, varies=True)
    claims.show()
    assert "4.25 (varies)" in capsys.readouterr().out


def test_a_lesson_without_claims_is_refused() -> None:
    claims = Claims()
    with pytest.raises(AssertionError, match="claims nothing"):
        claims.show()


def test_a_claim_made_again_replaces_the_first_one() -> None:
    """A reader who runs a cell twice makes its claims twice."""
    claims = Claims()
    claims.at_most("seconds", 5, 9)
    claims.check("more", True)
    claims.at_most("seconds", 5, 4)
    first, second = claims.to_list()
    assert (first["claim"], first["measured"], first["holds"], first["made"]) == ("seconds", 4, True, 2)
    assert (second["claim"], second["made"]) == ("more", 1)


def test_claims_are_strict_json() -> None:
    claims = Claims()
    claims.equal("not finite", [1.0, math.inf], [np.float32(1), math.nan])
    claims.equal("whole", np.int64(3), Path("x"))
    text = json.dumps(claims.to_list(), allow_nan=False)
    assert json.loads(text)[0]["measured"] == [1.0, "nan"] and json.loads(text)[1]["measured"] == "x"


# --- a real kernel ---------------------------------------------------------------------------------------------------

CELLS = [
    """
from tutorial_lib.lab import figures, sources
from tutorial_lib.lab.claims import Claims
from tutorial_lib.lab.progress import LiveCurve, progress
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
    """
import time
from unittest import mock
said = []
def comes(text):
    # Is the text shown within ten seconds, without a new row?
    end = time.monotonic() + 10
    while not any(text in s for s in said) and time.monotonic() < end:
        time.sleep(0.1)
    print(any(text in s for s in said))
curve, line = LiveCurve(40, title="slow", interval=0.2), progress(10, title="two", labels=["a", "b"], curve=False)
with mock.patch.object(LiveCurve, "_show", lambda self, data, metadata=None: said.append(data["text/plain"])), curve:
    comes("slow: starting processes ... 1 s")
    curve.on_rows(rows[:5])
    curve.on_rows(rows[5:12])  # too soon after the last drawing, and no rows follow
    comes("step 12 of 40")
with mock.patch.object(type(line), "_show", lambda self, data, metadata=None: said.append(data["text/plain"])), line:
    line.on_rows(rows[:10])
    comes("run 2 of 2, b: starting ... 2 s")
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


def test_who_waits_sees_seconds_go_by_and_the_last_rows(executed: Path) -> None:
    shown = "".join(o.text for o in outputs_of(executed, 6) if o.output_type == "stream")
    assert shown.split() == ["True"] * 3


def test_a_run_without_a_new_step_says_so(executed: Path) -> None:
    """A complete run has nothing left to train; its line must not promise processes forever."""
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


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_is_aligned_text_and_plain_html() -> None:
    shown = display.table(
        [{"stage": "0", "bytes": 2179072, "ratio": 1.0}, {"stage": "3 <offload>", "bytes": None, "ratio": 1 / 3}],
        caption="Model states",
    )
    assert str(shown).splitlines() == [
        "Model states",
        "stage            bytes     ratio",
        "-----------  ---------  --------",
        "0            2,179,072         1",
        "3 <offload>          -  0.333333",
    ]
    html = shown._repr_mimebundle_()["text/html"]
    assert "3 &lt;offload&gt;" in html and "<caption" in html and "text-align:right" in html
    assert "color:#" not in html  # a theme's own colours apply
    assert display.table([{"a": 1, "b": 2}], ["b"]).columns == ("b",)
    assert str(display.table([])) == "\n"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (9_999, "9,999 B"), (139_840 * 4, "546.2 KiB"), (7.5e9, "6.985 GiB"), (2**50, "1,024 TiB")],
)
def test_bytes_as_text(num_bytes: float, text: str) -> None:
    assert display.format_bytes(num_bytes) == text


# --- figures ---------------------------------------------------------------------------------------------------------


def every_figure() -> dict[str, figures.Figure]:
    rows = metrics(20)
    states = {
        f"stage {stage}": {
            "paper": memory.model_states(10**6, stage, 2).to_dict(),
            "estimator": {"total": 9e6},
            "measured": memory.model_states(10**6, stage, 4).to_dict(),
        }
        for stage in memory.STAGES
    }
    return {
        "curves": figures.loss_curves({"a": rows, "b": rows}, title="Both agree", alt="Two lines.", marks={"stop": 9}),
        "lines": figures.lines({"a": ([0, 0.5], [1, 2])}, title="t", alt="A line.", x_label="s", y_label="B"),
        "points": figures.lines(
            {"a": ([0, 1], [1, 2])},
            points={"seen": ([0, 1], [1, 2])},
            title="t",
            alt="A line.",
            x_label="s",
            y_label="B",
        ),
        "timeline": figures.memory_timeline(
            {"process tree": ([0, 0.5], [800 * 2**20, 900 * 2**20])},
            title="It grows",
            alt="A line.",
            marks={"step": 0.2},
        ),
        "bars": figures.bars({"a": 1, "b": 2.5}, title="b is more", alt="Bars.", unit="s", reference=("r", 2)),
        "memory": figures.grouped_memory(states, title="Stages divide", alt="Stacked bars."),
        "stacked": figures.stacked_bars(
            {"a, rank 0": {"weights": 1, "rest": 2.5}, "b, rank 0": {"weights": 2}},
            title="b has no rest",
            alt="Stacked bars.",
            unit="B",
            groups=["a", "b"],
        ),
        "shards": figures.shards({"by rows": [[0, 0], [1, 1]]}, title="A rank, a row", alt="Two halves."),
    }


@pytest.fixture(scope="module")
def drawn() -> dict[str, figures.Figure]:
    return every_figure()


def test_figures_are_the_same_twice(drawn: dict[str, figures.Figure]) -> None:
    assert {name: figure.png for name, figure in drawn.items()} == {name: f.png for name, f in every_figure().items()}


def lowest_contrast(colors: np.ndarray) -> float:
    """Return the lowest contrast (as in WCAG 2) of any colour against a white page or a dark one, #111111."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return float(min((1.05 / (luminance + 0.05)).min(), ((luminance + 0.05) / 0.0556).min()))


@pytest.mark.parametrize("name", ["curves", "lines", "points", "timeline", "bars"])
def test_figures_are_readable_on_light_and_dark_pages(drawn: dict[str, figures.Figure], name: str) -> None:
    """Transparent background, and every opaque pixel far enough from white and from black."""
    figure = drawn[name]
    pixels = png.imread(io.BytesIO(figure.png))
    assert np.allclose(pixels.shape[:2], (2 * figure.height, 2 * figure.width), atol=1)
    assert (pixels[..., 3] == 0).mean() > 0.3
    # A little below the palette's: where two colours cross, their pixels mix.
    assert lowest_contrast(pixels[pixels[..., 3] > 0.99][:, :3]) > 2.9


@pytest.mark.parametrize(("color", "lowest"), [(figures.INK, 4.0), *((color, 3.0) for color in figures.PALETTE)])
def test_ink_and_palette_stand_out_from_white_and_from_black(color: str, lowest: float) -> None:
    assert lowest_contrast(np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])) >= lowest


def test_memory_over_time_is_drawn_from_zero_in_the_unit_asked_for() -> None:
    words = {"title": "It grows", "alt": "A line."}
    drawn = figures.memory_timeline({"GPU 0": ([0.0, 2.5], [2**30, 3 * 2**30])}, unit="GiB", **words)
    labels = {"x_label": "time (s)", "y_label": "memory held (GiB)"}
    assert drawn == figures.lines({"GPU 0": ([0.0, 2.5], [1, 3])}, y_start=0, **labels, **words)
    assert drawn != figures.lines({"GPU 0": ([0.0, 2.5], [1, 3])}, **labels, **words)


def test_a_note_is_drawn_in_the_figure() -> None:
    words = {"title": "It falls", "alt": "A line.", "x_label": "s", "y_label": "B"}
    line = {"a": ([0, 1], [2, 1])}
    assert figures.lines(line, notes={"1.5 B": (0.5, 1.6)}, **words) != figures.lines(line, **words)


def test_a_figure_needs_a_title_and_a_description() -> None:
    for title, alt in (("", "alt"), ("title", " ")):
        with pytest.raises(ValueError, match="alt text"):
            figures.bars({"a": 1}, title=title, alt=alt, unit="s")


# --- sources ---------------------------------------------------------------------------------------------------------


def test_the_source_shown_is_the_source() -> None:
    shown = sources.show_source(memory.savings_ratio)
    text = Path(memory.__file__).read_text(encoding="utf-8")
    assert shown.name == "tutorial_lib.theory.memory.savings_ratio"
    assert shown.text.startswith("def savings_ratio(") and shown.text in text
    assert str(ROOT) not in shown.html() + str(shown)


def test_methods_properties_and_class_methods_by_name() -> None:
    shown = sources.show_source(claims_module.Claims, only=["show", "check"])
    assert shown.text.index("def show") < shown.text.index("def check") and "def equal" not in shown.text
    assert sources.show_source(memory.ModelStates, only="total").text.startswith("@property\ndef total")
    assert sources.show_source(memory, only="ModelStates.to_dict").text.startswith("def to_dict")
    with pytest.raises(ValueError, match=r"'shown'.*show"):
        sources.show_source(claims_module.Claims, only="shown")


def test_docstrings_can_be_left_out() -> None:
    shown = sources.show_source(memory.Precision, docstrings=False)
    assert '"""' not in shown.text and "parameters: int" in shown.text
    compile(shown.text, "shown", "exec")


def test_source_html_keeps_every_character() -> None:
    import html
    import re

    shown = sources.Source("name", 'def f(x: "A<B") -> None:\n    """Doc & more."""\n    return x  # why\n')
    body = re.search(r"<pre[^>]*><code[^>]*>(.*)</code></pre>", shown.html(), re.DOTALL)
    assert body and html.unescape(re.sub(r"<[^>]+>", "", body[1])) == shown.text.rstrip()
    assert "color:#" in shown.html() and "var(" not in shown.html(), "JupyterLab removes variables from outputs not run"


# --- progress --------------------------------------------------------------------------------------------------------


def test_a_log_gets_a_line_now_and_then_and_the_last_step() -> None:
    out = io.StringIO()
    with LogLines(40, title="ZeRO-3", interval=3600, file=out) as shown:
        shown.on_rows(metrics(10))
        shown.on_rows([])
        shown.on_rows(metrics(5, start=11))
    shown.close()
    started, last = out.getvalue().splitlines()
    assert started == "ZeRO-3: starting processes ..."
    assert last == "ZeRO-3: step 15 of 40, loss 5.8500, 2000 tokens/s"
    out = io.StringIO()
    with LogLines(None, interval=0, file=out) as shown:
        shown.on_rows(metrics(10))
        time.sleep(0.001)
        shown.on_rows(metrics(5, start=11))
    assert out.getvalue().splitlines()[1:] == [
        "training: step 10, loss 5.9000, 2000 tokens/s",
        "training: step 15, loss 5.8500, 2000 tokens/s",
    ]


def test_a_bar_counts_steps_from_where_a_run_resumed() -> None:
    out = io.StringIO()
    with TerminalBar(40, title="resumed", file=out) as shown:
        shown.on_rows(metrics(10, start=21))
        shown.on_rows(metrics(10, start=31))
    last = out.getvalue().split("\r")[-1]
    assert "resumed: 100%" in last and "40/40" in last and "loss=5.6000" in last and "tokens_per_s=2000" in last


def test_several_runs_in_a_row_are_told_apart() -> None:
    out = io.StringIO()
    with LogLines(10, title="t", labels=["stage 0", "stage 1"], interval=3600, file=out) as shown:
        shown.on_rows(metrics(10))
        shown.on_rows(metrics(10) + metrics(4))
    assert [len(rows) for rows in shown.runs] == [10, 10, 4]
    assert out.getvalue() == "t: starting processes ...\nt 3: step 4 of 10, loss 5.9600, 2000 tokens/s\n"


def test_without_rows_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (LogLines(5), LiveCurve(5)):
        shown.close()
    assert capsys.readouterr() == ("", "")


def test_a_log_is_chosen_where_no_one_watches(capsys: pytest.CaptureFixture[str]) -> None:
    assert type(progress(10)) is LogLines


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(images.PICTURES))
def test_committed_pictures_are_what_the_code_draws(name: str, tmp_path: Path) -> None:
    drawn = images.draw(name, tmp_path / "a").read_bytes()
    assert drawn == images.draw(name, tmp_path / "b").read_bytes()
    committed = images.DIRECTORY / f"{name}.svg"
    assert committed.read_bytes() == drawn, f"{committed.name} is not what the code draws: run `make images`"
    assert b"<text" not in drawn and b"<dc:date" not in drawn  # letters are shapes; nothing changes by the day


def test_no_other_picture_is_committed() -> None:
    assert {path.stem for path in images.DIRECTORY.glob("*.svg")} == set(images.PICTURES)


# --- the border ------------------------------------------------------------------------------------------------------


def test_the_lab_imports_no_heavy_library_and_no_engine() -> None:
    program = (
        "import sys\n"
        "from tutorial_lib.lab import claims, display, figures, images, progress, sources\n"
        "heavy = {'torch', 'deepspeed', 'ray', 'transformers', 'matplotlib', 'IPython'} & set(sys.modules)\n"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('tutorial_lib.')}\n"
        "assert not heavy and rooms <= {'lab', 'theory'}, (heavy, rooms)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_mime_type_is_json() -> None:
    """Only types that end in +json may carry lists in a notebook."""
    assert MIME_TYPE.endswith("+json")
