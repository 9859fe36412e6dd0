"""Page of faults: ``docs/faults.md`` lists the faults that the tests are marked with."""

import pytest

from tests.distributed.faults import page
from tests.distributed.faults.outcomes import RESUMES
from tests.distributed.faults.page import BETWEEN_NODES, ON_RANKS, ON_RAY_NODES, Fault

MARKED = """
@pytest.mark.fault("SIGKILL of a rank", RESUMES)
@pytest.mark.timeout(3)
@pytest.mark.fault("a full disk", "stops "
    "and says so")
def {name}(): ...
"""


def test_the_page_lists_the_faults_of_the_tests():
    assert page.PAGE.read_text(encoding="utf-8") == page.text(), "run `python -m tests.distributed.faults`"


@pytest.mark.parametrize("files", [ON_RANKS, ON_RAY_NODES, BETWEEN_NODES], ids=["ranks", "ray", "torchrun"])
def test_each_fault_is_listed_once(files):
    faults = [fault.happens for fault in page.faults_in(files)]
    assert faults and len(set(faults)) == len(faults)


def test_marks_are_read_from_top_to_bottom():
    faults = [Fault("SIGKILL of a rank", RESUMES), Fault("a full disk", "stops and says so")]
    assert page.faults_of(MARKED.format(name="test_both")) == faults


def test_a_mark_on_a_helper_is_an_error():
    with pytest.raises(AssertionError, match="helper is marked with a fault, but is not a test"):
        page.faults_of(MARKED.format(name="helper"))
