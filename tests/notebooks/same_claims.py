"""Pytest plugin beside nbval that compares the claims of a fresh run with the committed ones.

``-p tests.notebooks.same_claims`` adds one test to every notebook, after its last cell. The test reads the claims from
the outputs that nbval has just produced, so that no notebook runs twice. It passes if every claim holds and every
number equals the committed one, up to rounding.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from nbval.plugin import IPyNbCell

from tutorial_lib.lab.claims import Claims, claims_of

RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""Largest gap between two runs' numbers. Rounding changes a loss by 1e-6 of its size, and small differences by more."""

Claim = dict[str, Any]


def describe_untrue(found: list[Claim]) -> list[str]:
    """Describe the claims that do not hold, as recorded or when checked again, and those that were made twice."""
    again = Claims()
    for claim in found:
        text, expected, measured = claim["claim"], claim["expected"], claim["measured"]
        if claim["relation"] == "equal":
            again.equal(text, expected, measured, tolerance=claim["tolerance"])
        elif claim["relation"] == "at least":
            again.at_least(text, expected, measured)
        elif claim["relation"] == "at most":
            again.at_most(text, expected, measured)
        else:
            again.check(text, claim["holds"], expected=expected, measured=measured)
    wrong = (old for old, new in zip(found, again.to_list(), strict=True) if not (old["holds"] is new["holds"] is True))
    twice = [f"{claim['claim']}: made {claim['made']} times" for claim in found if claim.get("made", 1) > 1]
    return [f"{claim['claim']}: does not hold with {claim['measured']!r}" for claim in wrong] + twice


def describe_differences(committed: list[Claim], fresh: list[Claim]) -> list[str]:
    """Describe where a run's claims differ from the committed ones. Of a claim that varies, only the text counts."""
    texts, fresh_texts = ([claim["claim"] for claim in claims] for claims in (committed, fresh))
    if texts != fresh_texts:
        lost, new = set(texts) - set(fresh_texts), set(fresh_texts) - set(texts)
        return [f"the claims or their order changed; missing now: {sorted(lost)}; new: {sorted(new)}"]
    return [
        f"{old['claim']}: {part} was {old[part]!r} when committed and is {new[part]!r} now"
        for old, new in zip(committed, fresh, strict=True)
        for part in ("relation", "expected", "measured")
        if not new["varies"] and not _same(old[part], new[part], exact=not new["tolerance"])
    ]


def _same(old: Any, new: Any, *, exact: bool) -> bool:
    """Compare text exactly, integers exactly unless the claim has a tolerance, and floats up to rounding."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(_same(a, b, exact=exact) for a, b in zip(old, new, strict=True))
    numbers = [value for value in (old, new) if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < 2 or (exact and all(isinstance(value, int) for value in numbers)):
        return bool(old == new)
    return math.isclose(old, new, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


class SameClaims(pytest.Item):
    """The test that follows a notebook's last cell."""

    def runtest(self) -> None:
        cells = [item for item in self.session.items if isinstance(item, IPyNbCell) and item.parent is self.parent]
        committed = claims_of(output for cell in cells for output in cell.cell.outputs)
        fresh = claims_of(output for cell in cells for output in cell.test_outputs or [])
        found = describe_untrue(fresh) + describe_differences(committed, fresh)
        if not committed:
            found = ["the notebook was committed without claims"]
        if found:
            pytest.fail("\n".join(found), pytrace=False)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.path.name}::{self.name}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add a test of the claims after the last cell of every notebook."""
    last_cells = {item.parent: item for item in items if isinstance(item, IPyNbCell)}
    for notebook, cell in last_cells.items():
        items.insert(items.index(cell) + 1, SameClaims.from_parent(notebook, name="claims"))
