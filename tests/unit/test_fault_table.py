"""The page of faults is the table that the tests prove, and every row of it has a test."""

import re
from pathlib import Path

from tests.distributed import faults


def test_the_page_shows_the_table():
    assert faults.PAGE.read_text(encoding="utf-8") == faults.page(), "run `python -m tests.distributed.faults`"


def test_every_row_is_proved():
    tests = (Path(faults.__file__).parent / "test_faults.py").read_text(encoding="utf-8")
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS)
    assert {f"{fault.name}" for fault in faults.FAULTS} == set(re.findall(r'^@proves\("(\w+)"\)', tests, re.MULTILINE))
