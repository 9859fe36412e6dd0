"""Page of faults: ``docs/faults.md`` lists the faults that the tests are marked with."""

import pytest

from tests.distributed.faults import page
from tests.distributed.faults.outcomes import RESUMES
from tests.distributed.faults.page import GROUPS, TESTS, Fault

MARKED = """
@pytest.mark.fault("SIGKILL of a rank", RESUMES)
@pytest.mark.timeout(3)
@pytest.mark.fault("a full disk", "stops "
    "and says so")
def {name}(): ...
"""


def test_the_page_lists_the_faults_of_the_tests():
    assert page.PAGE.read_text(encoding="utf-8") == page.text(), "run `python -m tests.distributed.faults`"


@pytest.mark.parametrize("group", GROUPS)
def test_each_fault_is_listed_once(group):
    faults = [fault.happens for fault in page.faults_by_group()[group]]
    assert faults and len(set(faults)) == len(faults)


def test_marks_are_read_from_top_to_bottom():
    faults = [Fault("SIGKILL of a rank", RESUMES), Fault("a full disk", "stops and says so")]
    assert page.faults_of(MARKED.format(name="test_both")) == faults


def test_a_mark_on_a_helper_is_an_error():
    with pytest.raises(AssertionError, match="helper is marked with a fault, but is not a test"):
        page.faults_of(MARKED.format(name="helper"))


def test_a_mark_in_a_file_without_a_group_is_an_error():
    with pytest.raises(
        AssertionError, match=r"tests/distributed/test_resume\.py has tests marked with a fault: add it"
    ):
        page.group_of(TESTS / "distributed" / "test_resume.py")
