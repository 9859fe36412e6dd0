"""Exercises: a question with folded hints and a folded solution, and a check of the reader's own answer.

A lesson shows the exercise in one cell and checks the answer in the next::

    lowest = Exercise(
        "Which stage has the lowest peak in your run?",
        check=choice("3", near={"2": "Stage 2 still keeps the full parameters on every rank."}),
        hints=["Sort your table by its peak column."],
        solution="Stage 3: it divides the parameters, too.",
    )
    lowest

    lowest.check(...)  # write your answer in place of the dots

A missing answer is neither right nor wrong, so a notebook with unanswered exercises still runs.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FRAME = "border-left:3px solid rgba(128,128,128,0.6);padding:0.1em 1em;margin:0.5em 0"
_MARKS = {True: "✓ Right.", False: "✗ Not yet.", None: "✎ Write your answer."}


@dataclass(frozen=True, slots=True, repr=False)
class Feedback:
    """A check's verdict on an answer. A notebook displays it; use ``str`` elsewhere."""

    right: bool | None
    """True if the answer is right, False if it is wrong, None if it is missing."""
    reason: str = ""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        reason = f" {_inline(self.reason)}" if self.reason else ""
        return {
            "text/html": f'<div style="{_FRAME}"><b>{_MARKS[self.right]}</b>{reason}</div>',
            "text/plain": str(self),
        }

    def __str__(self) -> str:
        return f"{_MARKS[self.right]} {self.reason}".rstrip()

    __repr__ = __str__


Check = Callable[[Any], "bool | Feedback"]
"""Function that judges an answer: :func:`number`, :func:`choice`, or any that returns True, False or a Feedback."""


class Exercise:
    """A question for the reader.

    Texts may contain `code` between backquotes, blocks of code between lines of three backquotes, and paragraphs
    separated by blank lines. Everything else is shown as written.

    Args:
        question: the question.
        check: function that judges an answer.
        hints: hints from the vaguest to the most explicit; each is folded.
        solution: the answer with its reason, folded.
    """

    def __init__(self, question: str, *, check: Check, solution: str, hints: Sequence[str] = ()) -> None:
        self.question = question
        self.hints = (hints,) if isinstance(hints, str) else tuple(hints)
        self.solution = solution
        self._check = check

    def check(self, answer: Any = ...) -> Feedback:
        """Return whether the answer is right, wrong, or still missing (``None``, ``...`` or an empty string).

        Raises:
            TypeError: the exercise's own check returned something other than True, False or a Feedback.
        """
        if answer is None or answer is ... or (isinstance(answer, str) and not answer.strip()):
            return Feedback(None, "Put it in place of the dots, then run the cell again.")
        try:
            verdict = self._check(answer)
        except (TypeError, ValueError) as error:  # for example, the answer is text but the check compares numbers
            return Feedback(False, f"The check cannot use the answer {answer!r} ({error}). Write it in another form.")
        if isinstance(verdict, Feedback):
            return verdict
        if verdict not in (True, False):
            raise TypeError(f"The check of {self.question!r} returned {verdict!r}: it must return True or False.")
        return Feedback(True) if verdict else Feedback(False, self._encourage())

    def _encourage(self) -> str:
        return "Have a look at the hints, then try again." if self.hints else "Look at your run again, then try again."

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": str(self)}

    def html(self) -> str:
        """Return the question as HTML, with each hint and the solution folded."""
        folded = [*zip(self._hint_names(), self.hints, strict=True), ("Solution", self.solution)]
        details = "".join(f"<details><summary>{name}</summary>{_blocks(text)}</details>" for name, text in folded)
        return f'<div style="{_FRAME}"><p><b>Exercise</b></p>{_blocks(self.question)}{details}</div>'

    def _hint_names(self) -> list[str]:
        count = len(self.hints)
        return ["Hint"] if count == 1 else [f"Hint {number} of {count}" for number in range(1, count + 1)]

    def __str__(self) -> str:
        """Return the question, and name the attributes that hold hints and solution: text cannot be folded."""
        count = len(self.hints)
        places = [f"{count} hint{'s' if count > 1 else ''} in .hints"] if count else []
        return f"Exercise: {self.question}\n({', '.join([*places, 'solution in .solution'])})"

    __repr__ = __str__


def number(
    expected: float,
    *,
    tolerance: float = 0.0,
    relative: float = 0.0,
    unit: str = "",
    near: Mapping[float, str] | None = None,
) -> Check:
    """Return a check that accepts numbers close to the expected one, and tells if a wrong one is too low or too high.

    Args:
        expected: the right number, from the reader's own run if it depends on the run.
        tolerance: largest absolute error of an answer.
        relative: largest error as a share of ``expected``; the larger of the two counts.
        unit: unit of the number, such as ``MiB``.
        near: replies to likely mistakes, keyed by the wrong number; the same tolerances apply.

    Raises:
        ValueError: ``expected`` is not finite, a tolerance is negative or NaN, or a mistake in ``near`` would be
            accepted.
    """
    if not (tolerance >= 0 and relative >= 0 and math.isfinite(expected)):
        raise ValueError(f"{expected=}, {tolerance=}, {relative=}: write finite numbers, and tolerances of 0 or more.")
    mistakes = dict(near or {})
    for mistake in mistakes:
        if _is_close(mistake, expected, tolerance, relative):
            raise ValueError(f"near={mistake} is within the tolerance of {expected}, so it would be accepted.")

    def check(answer: Any) -> Feedback:
        if isinstance(answer, (bool, str)):
            return Feedback(False, f"Write a number{f' of {unit}' if unit else ''}, without quotes.")
        value = float(answer)
        given = f"{value:,.6g}{f' {unit}' if unit else ''}"
        if _is_close(value, expected, tolerance, relative):
            return Feedback(True, _accepted(given, expected, tolerance, relative))
        for mistake, text in mistakes.items():
            if _is_close(value, mistake, tolerance, relative):
                return Feedback(False, text)
        if math.isnan(value):
            return Feedback(False, "That is not a number (NaN).")
        return Feedback(False, f"{given} is too {'low' if value < expected else 'high'}.")

    return check


def choice(right: str, *, near: Mapping[str, str]) -> Check:
    """Return a check that accepts one of several answers, and explains each wrong one.

    Args:
        right: the right answer. Case and spaces do not matter, and ``3`` means the same as ``"3"``.
        near: the other answers, each with an explanation of what is wrong with it.

    Raises:
        ValueError: an answer occurs twice.
    """
    explained = {_normalized(option): text for option, text in near.items()}
    options = [right, *near]
    if len({_normalized(option) for option in options}) < len(options):
        raise ValueError(f"The answers {options} are not all different.")

    def check(answer: Any) -> Feedback:
        if _normalized(answer) == _normalized(right):
            return Feedback(True)
        if (text := explained.get(_normalized(answer))) is not None:
            return Feedback(False, text)
        return Feedback(False, f"{answer!r} is not one of the answers. Write one of: {', '.join(sorted(options))}.")

    return check


def _is_close(value: float, expected: float, tolerance: float, relative: float) -> bool:
    # Allow a little more than the tolerance: 1.1 is within 0.1 of 1, but not in binary arithmetic.
    return abs(value - expected) <= max(tolerance, relative * abs(expected)) * (1 + 1e-9)


def _accepted(given: str, expected: float, tolerance: float, relative: float) -> str:
    allowed = max(tolerance, relative * abs(expected))
    return f"{given} (anything within {allowed:,.3g} of {expected:,.6g} counts)." if allowed else f"{given}."


def _normalized(answer: Any) -> str:
    return " ".join(str(answer).casefold().split())


def _blocks(text: str) -> str:
    """Return HTML for paragraphs and blocks of code."""
    parts = re.split(r"^```.*\n?", text, flags=re.MULTILINE)
    blocks = []
    for index, part in enumerate(parts):
        if index % 2:
            blocks.append(f"<pre><code>{html.escape(part.rstrip())}</code></pre>")
        else:
            paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", part)]
            blocks += [f"<p>{_inline(paragraph)}</p>" for paragraph in paragraphs if paragraph]
    return "".join(blocks)


def _inline(text: str) -> str:
    """Return HTML for a line of text, with code between backquotes marked as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
