"""Table of faults: docs/faults.md matches the tables, and every row has a test."""

import re
from pathlib import Path

import pytest

from tests.distributed import faults


def test_the_page_shows_the_table():
    assert faults.PAGE.read_text(encoding="utf-8") == faults.page(), "run `python -m tests.distributed.faults`"


@pytest.mark.parametrize(
    ("table", "proofs"),
    [
        (faults.FAULTS, ["distributed/test_faults.py"]),
        (faults.ON_NODES, ["cluster/test_ray.py"]),
        (faults.BETWEEN_NODES, ["cluster/test_slurm.py", "cluster/test_torchrun.py"]),
    ],
    ids=["ranks", "ray", "torchrun"],
)
def test_every_row_is_proved(table, proofs):
    here = Path(faults.__file__).parents[1]
    tests = "\n".join((here / proof).read_text(encoding="utf-8") for proof in proofs)
    assert len({fault.name for fault in table}) == len(table)
    stated = " ".join(re.findall(r"^@proves\((.+)\)", tests, re.MULTILINE))
    assert {fault.name for fault in table} == set(re.findall(r'"(\w+)"', stated))
