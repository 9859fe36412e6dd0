"""Collectives on one process."""

from tutorial_lib.mpu.collectives import all_gather_ints


def test_one_process_agrees_with_itself():
    assert all_gather_ints([3, 0, -(2**63)]) == [[3, 0, -(2**63)]]
