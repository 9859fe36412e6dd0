"""The README shows the table of faults that the tests prove, and every row of it has a test."""

import re
from pathlib import Path

import pytest

from tests.distributed import faults


def test_the_readme_shows_the_table():
    text = faults.README.read_text(encoding="utf-8")
    assert faults.written(text) == text, "run `python -m tests.distributed.faults --write`"
    assert f"these {len(faults.FAULTS)} faults" in text


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="has no lines"):
        faults.written("no markers")


def test_every_row_is_proved():
    tests = (Path(faults.__file__).parent / "test_faults.py").read_text(encoding="utf-8")
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS)
    assert {f"{fault.name}" for fault in faults.FAULTS} == set(re.findall(r'^@proves\("(\w+)"\)', tests, re.MULTILINE))
