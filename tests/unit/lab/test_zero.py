"""Lesson 01's exercises and figures, and its loop, which must be the take-home script's."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.support.exercise_assertions import assert_explains
from tutorial_lib.lab import zero
from tutorial_lib.lab.exercises import Exercise
from tutorial_lib.lab.scripts import DIRECTORY

LESSON = Path(__file__).parents[3] / "notebooks" / "01_zero_finetuning.ipynb"
EXERCISES: dict[str, tuple[Exercise, Any, dict[Any, str]]] = {
    "stage": (
        zero.which_stage(13_000_000_000, num_ranks=8, gpu_gb=80, rest_gb=20),
        2,
        {0: "208.0 + 20 GB", 1: "71.5 + 20 GB", 3: "So does a lower stage"},
    ),
    "stage 3": (
        zero.which_stage(30_000_000_000, num_ranks=8, gpu_gb=80, rest_gb=10),
        "3",
        {"2": "112.5 + 10 GB", "1": "165.0 + 10 GB", "4": "not one of the answers"},
    ),
    "forgotten": (zero.what_was_forgotten(), "b", {"a": "different rows", "c": "base model"}),
    "loss": (
        zero.loss_of_the_step(means=[2.0, 4.0], tokens=[100, 300]),
        3.5,
        {3: "Give every token the same weight", 2: "rank 0 alone", 4: "too high"},
    ),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_is_accepted_and_wrong_ones_are_explained(name: str) -> None:
    assert_explains(*EXERCISES[name])


@pytest.mark.parametrize(("num_params", "rest_gb"), [(1_000_000_000, 20), (70_000_000_000, 20)])
def test_a_question_without_a_choice_is_refused(num_params: int, rest_gb: int) -> None:
    """One billion parameters fit without ZeRO, and seventy billion do not fit at all."""
    with pytest.raises(ValueError, match="nothing to choose"):
        zero.which_stage(num_params, num_ranks=8, gpu_gb=80, rest_gb=rest_gb)


def test_the_first_running_means_average_fewer_values() -> None:
    assert zero.smooth([4.0, 2.0, 3.0, 7.0], window=2) == [4.0, 3.0, 2.5, 5.0]


def test_a_figure_is_the_same_twice_and_different_for_other_numbers() -> None:
    words = {"title": "It falls", "alt": "A falling line."}
    drawn = [zero.loss_figure([4.0, 3.5, last], {0: 4.2, 3: 3.6}, **words).png for last in (3.0, 3.0, 3.9)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_json_documents_are_printed_under_their_headings() -> None:
    shown = zero.SideBySide({"bf16": {"bf16": {"enabled": True}}, "<none>": {}})
    assert str(shown) == 'bf16\n{\n  "bf16": {\n    "enabled": true\n  }\n}\n\n<none>\n{}'
    page = shown._repr_mimebundle_()["text/html"]
    assert page.index("<b>bf16</b>") < page.index("&quot;enabled&quot;: true") < page.index("<b>&lt;none&gt;</b>")


def test_the_lessons_loop_is_the_scripts_word_for_word() -> None:
    cells = [cell.source for cell in nbformat.read(LESSON, as_version=4).cells if cell.cell_type == "code"]
    (shown,) = [source for source in cells if source.startswith("def train_loop(")]
    script = (DIRECTORY / "train_zero.py").read_text(encoding="utf-8")
    (loop,) = [
        each for each in ast.parse(script).body if isinstance(each, ast.FunctionDef) and each.name == "train_loop"
    ]
    assert shown == ast.get_source_segment(script, loop)
