"""Test that follows a notebook's last cell in `make nbval`, which fails if a number differs from the committed one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tests.notebooks import run
from tests.notebooks.same_claims import describe_differences, describe_untrue
from tutorial_lib.lab.claims import MIME_TYPE, Claims

Made = list[dict[str, Any]]


def claims(measured: Any, *, text: str = "a number", **options: Any) -> Made:
    made = Claims()
    made.equal(text, 2_773_248, measured, **options)
    return made.to_list()


@pytest.mark.parametrize(
    ("committed", "fresh"),
    [
        (4.484903, 4.484905),  # rounding of a loss
        (1.7e-07, 0.0),  # a difference that is only rounding
        (0.0008088, 0.0008087),  # a difference of two losses
        ([1.0, [2.0, 3.0]], [1.0, [2.0, 3.00001]]),
        (2, 2.0),
        ("refused", "refused"),
        (None, None),
    ],
)
def test_equal_claims_have_no_differences(committed: Any, fresh: Any) -> None:
    assert describe_differences(claims(committed), claims(fresh)) == []


@pytest.mark.parametrize(
    ("committed", "fresh"),
    [
        (4.4849, 4.4859),
        (0.0008, 0.0009),
        (3612, 3611),
        (10_000_000, 10_000_001),
        ([1, 2], [1, 2, 3]),
        ([1.5, 2.5], [1.5, 2.6]),
        ("refused", "accepted"),
        (True, False),
        (True, 1.5),
        (None, 0.5),
        (1.5, "nan"),
    ],
)
def test_different_claims_are_described(committed: Any, fresh: Any) -> None:
    (said,) = describe_differences(claims(committed), claims(fresh))
    assert said == f"a number: measured was {committed!r} when committed and is {fresh!r} now"


def test_a_claim_says_what_may_differ() -> None:
    assert describe_differences(claims(2_773_408), claims(2_773_248)) != []
    tolerant = {"relative": 1e-3}
    assert describe_differences(claims(2_773_408, **tolerant), claims(2_773_248, **tolerant)) == []
    assert describe_differences(claims(0.035), claims(0.027, varies=True)) == []


def test_a_bound_that_moved_and_a_claim_that_is_gone_are_differences() -> None:
    loose, strict = Claims(), Claims()
    loose.at_most("small", 0.2, 0.1)
    strict.at_most("small", 0.1, 0.1)
    assert describe_differences(strict.to_list(), loose.to_list()) == [
        "small: expected was 0.1 when committed and is 0.2 now"
    ]
    (said,) = describe_differences(claims(1), claims(1, text="another"))
    assert said == "the claims or their order changed; missing now: ['a number']; new: ['another']"
    assert describe_differences(claims(1), []) != []


def test_failed_claims_are_differences_whatever_they_allow() -> None:
    made = Claims()
    made.at_most("small", 0.1, 0.2, varies=True)
    assert describe_untrue(made.to_list()) == ["small: does not hold with 0.2"]
    (claim,) = made.to_list()
    assert describe_untrue([claim | {"holds": True}]) == ["small: does not hold with 0.2"]


def write(path: Path, measured: float, *, committed: Made | None = None, more: str = "", varies: bool = False) -> None:
    """Write a notebook that claims to measure a number, committed with the claims of another run."""
    source = (
        "from tutorial_lib.lab.claims import Claims\nclaims = Claims()\n"
        f"claims.at_most('the loss', 5.0, {measured}, varies={varies})\n{more}\nclaims.show()"
    )
    outputs = [new_output("display_data", {MIME_TYPE: committed})] if committed else []
    nbformat.write(new_notebook(cells=[new_code_cell(source, execution_count=1, outputs=outputs)]), path)


def test_nbval_runs_a_notebook_once_and_its_claims_are_compared(tmp_path: Path) -> None:
    made = Claims()
    made.at_most("the loss", 5.0, 4.2)
    committed = made.to_list()
    write(tmp_path / "as_committed.ipynb", 4.2, committed=committed, more="open('runs', 'a').write('once')")
    write(tmp_path / "another_number.ipynb", 4.3, committed=committed)
    write(tmp_path / "varies.ipynb", 4.3, committed=committed, varies=True)
    write(tmp_path / "without_claims.ipynb", 4.2)
    write(tmp_path / "never_there.ipynb", 4.2, committed=committed, more="1 / 0")
    plugin = ["-m", "pytest", "-rA", "--rootdir", str(tmp_path), "-p", "tests.notebooks.same_claims"]
    nbval = ["--nbval-lax", "--nbval-current-env", *sorted(map(str, tmp_path.glob("*.ipynb")))]
    done = subprocess.run([sys.executable, *plugin, *nbval], cwd=run.ROOT, capture_output=True, text=True, timeout=120)
    lines = re.findall(r"^(PASSED|FAILED) \S*?(\w+\.ipynb::\w+(?: \d)?)", done.stdout, re.MULTILINE)
    results = {test: result for result, test in lines}
    assert results == {
        "another_number.ipynb::Cell 0": "PASSED",
        "another_number.ipynb::claims": "FAILED",
        "as_committed.ipynb::Cell 0": "PASSED",
        "as_committed.ipynb::claims": "PASSED",
        "never_there.ipynb::Cell 0": "FAILED",
        "never_there.ipynb::claims": "FAILED",
        "varies.ipynb::Cell 0": "PASSED",
        "varies.ipynb::claims": "PASSED",
        "without_claims.ipynb::Cell 0": "PASSED",
        "without_claims.ipynb::claims": "FAILED",
    }
    assert "the loss: measured was 4.2 when committed and is 4.3 now" in done.stdout
    assert (tmp_path / "runs").read_text() == "once"


def test_a_lesson_that_makes_a_claim_twice_is_seen() -> None:
    """A reader may run a cell again, but a lesson that runs from top to bottom makes each claim once."""
    claims = Claims()
    claims.equal("one", 1, 1)
    assert describe_untrue(claims.to_list()) == []
    claims.equal("one", 1, 1)
    assert describe_untrue(claims.to_list()) == ["one: made 2 times"]
