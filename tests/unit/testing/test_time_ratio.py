"""Ratio of the times that two calls take."""

import time

from tests.benchmarks.on_ranks import time_ratio


def test_time_ratio_alternates_and_takes_the_median() -> None:
    ratio = time_ratio(lambda: time.sleep(0.1), lambda: time.sleep(0.001), pairs=3)
    assert 1 < ratio["lowest"] <= ratio["median"] <= ratio["highest"] and ratio["pairs"] == 3
