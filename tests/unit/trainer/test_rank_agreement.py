"""Consistency checks within a tensor-parallel group."""

import math

import pytest

from tutorial_lib.mpu import Topology
from tutorial_lib.trainer.rank_agreement import RanksDisagree, check_batches, check_losses

GRID = Topology(dp=2, tp=2, rank=0)


def test_batches_may_differ_between_groups_and_not_within_one():
    check_batches(GRID, 7, [5, 5, 9, 9])
    check_batches(Topology(dp=4, tp=1, rank=0), 7, [1, 2, 3, 4])
    with pytest.raises(RanksDisagree, match=r"At step 7 ranks \[2, 3\].*fingerprints 0{15}9, f{16}\. Check the data"):
        check_batches(GRID, 7, [5, 5, 9, -1])


def test_losses_may_differ_only_by_rounding():
    check_losses(GRID, 3, [10.0, 10.0005, 99.0, 99.0])
    with pytest.raises(RanksDisagree, match=r"ranks \[0, 1\] .* differ: 10\.000000, 10\.002000\. Look at the seed"):
        check_losses(GRID, 3, [10.0, 10.002, 99.0, 99.0])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_left_to_another_check(loss):
    check_losses(GRID, 3, [loss, loss, 1.0, 1.0])
    check_losses(GRID, 3, [1.0, loss, 1.0, 1.0])
