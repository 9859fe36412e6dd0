"""Planner panel: the content of its widgets, and the number of evaluations in a redraw."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from tutorial_lib.lab import planner
from tutorial_lib.lab.planner import Question, answer, candidates, panel
from tutorial_lib.theory import plan as plan_page

MOST_EVALUATIONS = 3_000
"""Limit per redraw. An evaluation takes about 60 microseconds, so a redraw takes at most 0.2 s."""


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    counted: list[Any] = []
    evaluate = plan_page.evaluate

    def counting(*arguments: Any) -> Any:
        counted.append(arguments)
        return evaluate(*arguments)

    monkeypatch.setattr(plan_page, "evaluate", counting)
    candidates.cache_clear()
    return counted


@pytest.mark.parametrize(
    "question",
    [
        Question(),
        Question(model="llama-3-405b", gpus=1024, seq_length=8192, global_batch=1024),
        Question(model="llama-3-405b", gpus=1024, seq_length=131_072),
        Question(model="gpt2", gpus=1024, seq_length=512, global_batch=1024),
        Question(model="gpt2", gpus=1024, seq_length=1024, engine="deepspeed"),
        Question(model="llama-3-70b", gpus=64, global_batch=1024),
    ],
)
def test_a_redraw_costs_few_evaluations_and_the_same_question_none(question: Question, evaluations: list[Any]) -> None:
    answer(question)
    assert 0 < len(evaluations) <= MOST_EVALUATIONS
    before = len(evaluations)
    answer(question)
    assert len(evaluations) == before


def test_bars_add_up_to_the_peak_on_the_scale_of_the_gpus_line() -> None:
    found, cluster = candidates(Question(model="llama-2-7b", gpu="a100-80"))
    shown = [c for c in found if c.fits][: planner.BARS]
    svg = ElementTree.fromstring(planner.memory_bars(shown, cluster))
    space = "{http://www.w3.org/2000/svg}"
    stacked = [rect.attrib for rect in svg.iter(f"{space}rect") if float(rect.attrib["height"]) == 14]
    lengths = [float(rect["width"]) for rect in stacked]
    line = max(float(one.attrib["x1"]) for one in svg.iter(f"{space}line"))
    per_byte = (line - float(stacked[0]["x"])) / cluster.gpu_memory
    for number, candidate in enumerate(shown):
        assert sum(lengths[3 * number : 3 * number + 3]) == pytest.approx(candidate.memory * per_byte, abs=0.3)
    assert "80" not in svg.attrib["aria-label"] and "72 usable GB" in svg.attrib["aria-label"]
    assert {"usable 72 GB", "GPU 80 GB"} < {text.text for text in svg.iter(f"{space}text")}


def test_text_and_lines_have_the_colour_of_the_pages_text() -> None:
    """No fixed grey has a contrast of 4.5 : 1 on both white and JupyterLab's #111."""
    found, cluster = candidates(Question())
    svg = ElementTree.fromstring(planner.memory_bars(found, cluster))
    space = "{http://www.w3.org/2000/svg}"
    assert svg.attrib["fill"] == "currentColor" and not any("fill" in text.attrib for text in svg.iter(f"{space}text"))
    assert {line.attrib["stroke"] for line in svg.iter(f"{space}line")} == {"currentColor"}


def test_widgets_redraw(evaluations: list[Any]) -> None:
    box = panel(model="llama-3-8b", gpus=8, gpu="h100")
    shown = box.children[-1]
    first = shown.value
    assert "tokens/s per GPU" in first and re.search(r"Of \d+ layouts, \d+ fit", first)
    batch = box.children[1].children[1]
    assert batch.label == "automatic"
    batch.label = "64"
    assert shown.value != first
    batch.label = "automatic"
    assert shown.value == first
    gpus = box.children[0].children[2]
    gpus.value = 1
    assert shown.value != first
    model = box.children[0].children[0]
    model.value = "llama-3-405b"
    assert shown.value.startswith("<p>Nothing fits; the smallest layout is")
    assert re.search(r"host too small by|too large by", shown.value)


def test_slower_layouts_come_after_ties() -> None:
    found, _ = candidates(Question(model="llama-3-70b", gpus=64, seq_length=131_072))
    slower = ["slower" in candidate.slower for candidate in found if candidate.fits]
    assert any(slower) and slower == sorted(slower)


def test_questions_that_cannot_be_planned_show_the_reason() -> None:
    assert "12 gpus do not fill nodes of 8" in answer(Question(gpus=12))


def test_only_here_leaves_out_layouts_of_other_engines() -> None:
    found, _ = candidates(Question(model="llama-3-70b", gpus=64, only_here=True))
    assert not any(candidate.missing for candidate in found if candidate.fits)
