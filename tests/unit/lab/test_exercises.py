"""Exercises: right answers are accepted, wrong ones are refused with a reason, and missing ones are neither."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from tutorial_lib.lab.exercises import Exercise, Feedback, choice, number

ROOT = Path(__file__).parents[3]


def exercise(**changes: Any) -> Exercise:
    given: dict[str, Any] = {"question": "2 + 2?", "check": lambda answer: answer == 4, "solution": "4", **changes}
    return Exercise(given.pop("question"), **given)


# --- checks ----------------------------------------------------------------------------------------------------------


def test_right_and_wrong_answers() -> None:
    assert exercise().check(4).right is True
    assert exercise(check=lambda answer: np.bool_(answer > 3)).check(4).right is True
    wrong = exercise().check(5)
    assert wrong.right is False and str(wrong) == "✗ Not yet. Look at your run again, then try again."
    assert "hints" in str(exercise(hints=["Count."]).check(5))


@pytest.mark.parametrize("answer", [None, ..., "", "  \n"])
@pytest.mark.parametrize("check", [lambda answer: 1 / 0, number(0.0, tolerance=9), choice("", near={"none": "x"})])
def test_a_missing_answer_is_neither_right_nor_wrong(answer: Any, check: Any) -> None:
    feedback = exercise(check=check).check(answer)
    assert feedback.right is None and str(feedback).startswith("✎ Write your answer.")
    assert exercise(check=check).check() == feedback


def test_feedback_on_an_unusable_answer_says_so() -> None:
    feedback = exercise(check=lambda answer: answer > 3).check("four")
    assert feedback.right is False and "'four'" in feedback.reason and "another form" in feedback.reason


def test_a_check_that_returns_nothing_raises_a_type_error() -> None:
    with pytest.raises(TypeError, match="it must return True or False"):
        exercise(check=lambda answer: None).check(4)


def test_a_check_may_return_its_own_reason() -> None:
    feedback = exercise(check=lambda answer: Feedback(False, "Add, do not multiply.")).check(5)
    assert str(feedback) == "✗ Not yet. Add, do not multiply."


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right"),
    [(100, True), (110, True), (110.1, False), (90, True), (89.9, False), (np.float32(100), True), (math.inf, False)],
)
@pytest.mark.parametrize("allowed", [{"tolerance": 10.0}, {"relative": 0.1}, {"tolerance": 10.0, "relative": 0.01}])
def test_a_number_within_the_stated_tolerance(answer: Any, right: bool, allowed: dict[str, float]) -> None:
    assert number(100.0, **allowed)(answer).right is right


def test_the_edge_of_a_tolerance_is_not_lost_to_binary_fractions() -> None:
    assert number(1.0, tolerance=0.1)(1.1).right is True
    assert number(4)(4).right is True and number(4)(4.0001).right is False


def test_feedback_on_a_wrong_number_gives_the_direction_not_the_answer() -> None:
    check = number(139_840, relative=0.01, unit="MiB")
    assert str(check(1000)) == "✗ Not yet. 1,000 MiB is too low."
    assert str(check(10**9)) == "✗ Not yet. 1e+09 MiB is too high."
    assert str(check(140_000)) == "✓ Right. 140,000 MiB (anything within 1.4e+03 of 139,840 counts)."
    assert "number of MiB, without quotes" in str(check("139840")) and "number" in str(check(True))
    assert "NaN" in str(check(math.nan))


def test_a_likely_mistake_is_explained() -> None:
    check = number(16, tolerance=0.5, near={17.18: "You counted in GB: divide by 2**30."})
    assert str(check(17.2)) == "✗ Not yet. You counted in GB: divide by 2**30."
    assert "too high" in str(check(20))


def test_ambiguous_expected_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="would be accepted"):
        number(16, tolerance=2, near={17.18: "x"})
    for wrong in ({"tolerance": -1.0}, {"relative": math.nan}, {"expected": math.nan}):
        with pytest.raises(ValueError, match="finite"):
            number(**{"expected": 1.0, **wrong})


# --- choices ---------------------------------------------------------------------------------------------------------

STAGE = choice("stage 3", near={"stage 2": "Stage 2 keeps the full parameters.", "stage 1": "Stage 1 even more."})


@pytest.mark.parametrize(
    ("answer", "right", "said"),
    [
        ("stage 3", True, "✓ Right."),
        ("  Stage  3 ", True, "✓ Right."),
        ("Stage 2", False, "Stage 2 keeps the full parameters."),
        ("stage 4", False, "'stage 4' is not one of the answers. Write one of: stage 1, stage 2, stage 3."),
        (3, False, "Write one of"),
    ],
)
def test_a_multiple_choice_exercise(answer: Any, right: bool, said: str) -> None:
    feedback = exercise(check=STAGE).check(answer)
    assert feedback.right is right and said in str(feedback)


def test_a_number_may_be_given_as_text() -> None:
    assert choice("3", near={"2": "no"})(3) == Feedback(True)


def test_answers_that_are_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match="not all different"):
        choice("Stage 3", near={"stage 3": "x"})


# --- display ---------------------------------------------------------------------------------------------------------


def test_hints_and_solution_are_folded_in_html_and_named_in_text() -> None:
    shown = exercise(hints=["Count.", "Use your fingers."], solution="It is 4.")
    page = shown.html()
    assert page.index("2 + 2?") < page.index("<summary>Hint 1 of 2</summary><p>Count.</p></details>")
    assert page.endswith("<details><summary>Solution</summary><p>It is 4.</p></details></div>")
    assert page.count("<details>") == page.count("</details>") == 3 and " open" not in page
    assert str(shown) == repr(shown) == "Exercise: 2 + 2?\n(2 hints in .hints, solution in .solution)"
    assert str(exercise()).endswith("\n(solution in .solution)")
    assert "<summary>Hint</summary><p>Count.</p>" in exercise(hints="Count.").html(), "one hint may be a text"


def test_text_is_escaped_and_code_is_set_as_code() -> None:
    page = exercise(question="Is `a<b` & <script>?\n\nSay.", solution="So:\n```python\nx = '<&>'\n```\nDone.").html()
    assert "<p>Is <code>a&lt;b</code> &amp; &lt;script&gt;?</p><p>Say.</p>" in page
    assert "<p>So:</p><pre><code>x = &#x27;&lt;&amp;&gt;&#x27;</code></pre><p>Done.</p>" in page
    feedback = exercise(check=lambda answer: answer > 3).check("<img>")._repr_mimebundle_()
    assert "&lt;img&gt;" in feedback["text/html"] and "<img>" not in feedback["text/html"]


def test_in_a_real_kernel_open_exercises_do_not_stop_a_notebook() -> None:
    cells = [
        "from tutorial_lib.lab.exercises import Exercise, number\n"
        "sum_ = Exercise('2 + 2?', check=number(4), hints=['Count.'], solution='4')\nsum_",
        "sum_.check(...)",
        "sum_.check(5)",
        "sum_.check(4)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(ROOT)}}).execute()
    nbformat.validate(notebook)
    [question], [missing], [wrong], [right] = [cell.outputs for cell in notebook.cells]
    assert "<details><summary>Hint</summary>" in question.data["text/html"]
    assert question.data["text/plain"].startswith("Exercise: 2 + 2?")
    assert "<b>✎ Write your answer.</b>" in missing.data["text/html"]
    assert wrong.data["text/plain"] == "✗ Not yet. 5 is too high."
    assert right.data["text/plain"] == "✓ Right. 4."
