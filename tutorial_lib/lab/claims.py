"""Claims of a lesson, each checked against a measured value, shown as a table and kept as data.

>>> claims = Claims()
>>> claims.equal("ZeRO-3 computes the reference's loss", reference_loss, zero3_loss, tolerance=1e-6)
>>> claims.at_least("stage 3 saves at least 1.9 x on two ranks", 1.9, saved)
>>> claims.show()

:meth:`Claims.show` first displays the table, then raises if a claim does not hold, so that a notebook with a false
claim stops there. It also emits the claims under :data:`MIME_TYPE`; :func:`claims_in` reads them back from
the executed notebook. Tests run every notebook again and compare each claim's numbers with the committed ones. A number
that differs from run to run, such as a time, is marked with ``varies=True``; then the claim only has to hold.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from tutorial_lib.lab import display
from tutorial_lib.tables import Table, format_value, is_number, table

MIME_TYPE = "application/vnd.tutorial-lib.claims+json"
"""MIME type of the claims in an executed notebook: a list of ``{claim, relation, expected, measured, ...}``."""

_SIGNS = {"equal": "=", "at least": "≥", "at most": "≤", "holds": ""}


@dataclass(frozen=True, slots=True)
class Claim:
    """One line of the table.

    ``difference`` is the number that was compared with ``tolerance``, if there is one. ``relative`` is the tolerance as
    a share of the expected value, if it was given that way. ``varies`` marks numbers that another run or machine does
    not reproduce. ``made`` counts how often the claim was made: a reader who runs a cell twice makes its claims twice,
    and the last values count.
    """

    claim: str
    relation: str
    expected: Any
    measured: Any
    tolerance: float | None
    difference: float | None
    holds: bool
    relative: float | None = None
    varies: bool = False
    made: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the claim for JSON; NaN and infinity become text, because strict JSON has no such numbers."""
        return {name: _plain(getattr(self, name)) for name in self.__slots__}


class Claims:
    """The claims of one lesson, in the order in which they were made.

    Args:
        print_each: print a line for each claim as it is made, besides the table at the end.
    """

    def __init__(self, *, print_each: bool = False) -> None:
        self.print_each = print_each
        self._claims: list[Claim] = []

    def equal(
        self,
        text: str,
        expected: Any,
        measured: Any,
        *,
        tolerance: float = 0.0,
        relative: float | None = None,
        varies: bool = False,
    ) -> None:
        """Claim that two values, or two sequences of them, are equal.

        Args:
            text: the claim, as a sentence. If it is made again, as by a cell that runs twice, it replaces the old one.
            expected: a number, text, or a (nested) sequence of them.
            measured: the same kind of value. NaN equals nothing.
            tolerance: largest absolute difference between two numbers.
            relative: the tolerance as a share of the expected value, in place of ``tolerance``.
            varies: the numbers differ between runs or machines; the claim must still hold.
        """
        if relative is not None:
            if tolerance:
                raise ValueError("Give tolerance or relative, not both.")
            tolerance = relative * max((abs(n) for n in _numbers(expected)), default=0.0)
        difference = _largest_difference(expected, measured)
        holds = difference is not None and difference <= tolerance
        shown = difference if _numbers(expected) else None
        self._add(text, "equal", expected, measured, tolerance, shown, holds, relative, varies)

    def at_least(self, text: str, bound: float, measured: float, *, varies: bool = False) -> None:
        """Claim that a number is not below a bound; for ``varies`` see :meth:`equal`."""
        self._add(text, "at least", bound, measured, None, None, bool(measured >= bound), None, varies)

    def at_most(self, text: str, bound: float, measured: float, *, varies: bool = False) -> None:
        """Claim that a number is not above a bound; for ``varies`` see :meth:`equal`."""
        self._add(text, "at most", bound, measured, None, None, bool(measured <= bound), None, varies)

    def check(self, text: str, condition: bool, *, expected: Any = True, measured: Any = None) -> None:
        """Claim that any other condition holds, and show the value behind it.

        Args:
            text: the claim, as a sentence.
            condition: True if the claim holds.
            expected: the value to compare ``measured`` with.
            measured: the value behind the condition; default: the condition itself.
        """
        # NaN is "true" in Python, but proves nothing here.
        holds = bool(condition) and condition == condition
        self._add(text, "holds", expected, condition if measured is None else measured, None, None, holds)

    def show(self) -> None:
        """Display the table, folded if all claims hold, and emit the claims as data.

        Raises:
            AssertionError: some claims do not hold (all of them are named), or none was made.
        """
        if not self._claims:
            raise AssertionError("This lesson claims nothing: make claims before showing them.")
        text = self._table()
        display.show({MIME_TYPE: self.to_list(), "text/html": self._html(text), "text/plain": str(text)})
        failed = [claim for claim in self._claims if not claim.holds]
        if failed:
            lines = [
                f"  {c.claim}: expected {_SIGNS[c.relation]} {_short(c.expected)}, measured {_short(c.measured)}"
                + (f", off by {c.difference:.3g} with tolerance {_tolerance(c)}" if c.difference is not None else "")
                for c in failed
            ]
            raise AssertionError(f"{len(failed)} of {len(self._claims)} claims do not hold:\n" + "\n".join(lines))

    def to_list(self) -> list[dict[str, Any]]:
        """Return the claims as data, in the same form as :func:`claims_in`."""
        return [claim.to_dict() for claim in self._claims]

    def _add(self, text: str, *rest: Any) -> None:
        claim = Claim(text, *rest)
        if self.print_each:
            print(_line(claim))
        for place, earlier in enumerate(self._claims):
            if earlier.claim == text:
                self._claims[place] = dataclasses.replace(claim, made=earlier.made + 1)
                return
        self._claims.append(claim)

    def _table(self) -> Table:
        return table(
            [
                {
                    "claim": c.claim,
                    "expected": f"{_SIGNS[c.relation]} {_short(c.expected)}".strip(),
                    "measured": f"{_short(c.measured)}{' (varies)' if c.varies else ''}",
                    "tolerance": _tolerance(c),
                    "": "✓" if c.holds else "✗ does not hold",
                }
                for c in self._claims
            ]
        )

    def _html(self, shown: Table) -> str:
        held = sum(claim.holds for claim in self._claims)
        summary = f"{held} of {len(self._claims)} claims hold"
        unfolded = "" if held == len(self._claims) else " open"
        return f"<details{unfolded}><summary><strong>{html.escape(summary)}</strong></summary>{shown.html()}</details>"


def claims_in(notebook: str | Path) -> list[dict[str, Any]]:
    """Read the claims from an executed notebook's outputs, in order; empty if it shows none."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    return claims_of(output for cell in cells for output in cell.get("outputs", []))


def claims_of(outputs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Collect the claims among the outputs of cells, in order."""
    return [claim for output in outputs for claim in output.get("data", {}).get(MIME_TYPE, [])]


def _line(claim: Claim) -> str:
    """Return a claim as a line of text: the measured value, then the expected one and how close they have to be."""
    bound = f" {_SIGNS[claim.relation]} {_short(claim.expected) or 'none'}" if claim.relation != "holds" else ""
    within = f" within {_tolerance(claim)}" if claim.tolerance else ""
    return f"{'✓' if claim.holds else '✗'} {claim.claim}: {_short(claim.measured) or 'none'}{bound}{within}"


def _largest_difference(expected: Any, measured: Any) -> float | None:
    """Return the largest absolute difference of corresponding numbers; None if the values cannot be compared."""
    if _is_sequence(expected) or _is_sequence(measured):
        if not (_is_sequence(expected) and _is_sequence(measured)) or len(expected) != len(measured):
            return None
        differences = [_largest_difference(e, m) for e, m in zip(expected, measured, strict=True)]
        return None if None in differences else max((d for d in differences if d is not None), default=0.0)
    if is_number(expected) and is_number(measured):
        difference = 0.0 if expected == measured else abs(float(expected) - float(measured))
        return None if math.isnan(difference) else difference
    return 0.0 if expected == measured else None


def _tolerance(claim: Claim) -> str:
    if claim.relative:
        return f"{claim.relative:.3g} of expected"
    return "" if claim.tolerance is None else "exact" if claim.tolerance == 0 else f"{claim.tolerance:.3g}"


def _numbers(value: Any) -> list[float]:
    if _is_sequence(value):
        return [n for item in value for n in _numbers(item)]
    return [float(value)] if is_number(value) else []


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _short(value: Any) -> str:
    """Format numbers with enough digits for a tolerance of 1e-6; shorten long sequences."""
    if _is_sequence(value):
        shown = [_short(v) for v in value]
        return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "…", shown[-1]])
    if is_number(value) and math.isfinite(value) and value != int(value):
        return f"{value:.7g}" if abs(value) >= 1e-4 else f"{value:.3g}"
    return format_value(value)


def _plain(value: Any) -> Any:
    if _is_sequence(value):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        # JupyterLab would turn 0.0 into 0 when a reader saves the notebook, so write it like that from the start.
        return int(number) if number.is_integer() else number if math.isfinite(number) else str(number)
    return str(value)
