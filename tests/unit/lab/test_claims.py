"""Claims that can fail: tolerances, bounds, and the table that a reader sees."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tutorial_lib.lab import display
from tutorial_lib.lab.claims import Claims


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


def test_show_names_every_failed_claim(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_the_table_is_folded_only_while_all_claims_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(display, "show", shown.append)
    claims = Claims()
    claims.equal("one", 1, 1)
    claims.show()
    claims.equal("two", 2, 3)
    with pytest.raises(AssertionError):
        claims.show()
    folded, unfolded = (data["text/html"] for data in shown)
    assert folded.startswith("<details><summary>") and unfolded.startswith("<details open><summary>")


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
