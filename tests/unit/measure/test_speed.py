"""Speed: FLOPs and ratios of times."""

from __future__ import annotations

import time

import torch

from tutorial_lib.measure import speed


def test_matmul_peak_is_a_plausible_number_of_flops() -> None:
    before = torch.get_num_threads()
    peak = speed.matmul_peak(256, seconds=0.05, num_threads=1)
    assert 1e8 < peak < 1e13
    assert torch.get_num_threads() == before


def test_time_ratio_alternates_and_takes_the_median() -> None:
    ratio = speed.time_ratio(lambda: time.sleep(0.1), lambda: time.sleep(0.001), pairs=3)
    assert 1 < ratio.lowest <= ratio.median <= ratio.highest and ratio.pairs == 3
