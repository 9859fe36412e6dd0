"""Checkpoint interval: the closed forms, compared with each other, with a simulation, and with a search."""

import math

import pytest

from tutorial_lib.theory import save_interval

CASES = [(30.0, 6 * 3600.0, 300.0), (120.0, 3600.0, 600.0), (5.0, 86_400.0, 60.0)]
"""Seconds for a save, between failures, and for a restart."""


@pytest.mark.parametrize("save, mean_time, restart", CASES)
@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_the_formula_matches_a_simulation(save, mean_time, restart, factor):
    interval = factor * save_interval.young_interval(save, mean_time)
    exact = save_interval.lost_share(interval, save, mean_time, restart)
    # With thousands of failures, their mean is within a few percent.
    played = save_interval.simulate_lost_share(interval, save, mean_time, restart, num_saves=60_000)
    assert played == pytest.approx(exact, rel=0.06)
    assert played != exact


@pytest.mark.parametrize("save, mean_time, restart", CASES)
def test_dalys_interval_is_the_minimum(save, mean_time, restart):
    daly = save_interval.daly_interval(save, mean_time)
    grid = [daly * 1.001**k for k in range(-1500, 1500)]
    best = min(grid, key=lambda interval: save_interval.lost_share(interval, save, mean_time, restart))
    assert daly == pytest.approx(best, rel=0.005)
    least = save_interval.lost_share(best, save, mean_time, restart)
    assert save_interval.lost_share(daly, save, mean_time, restart) == pytest.approx(least, rel=1e-4)
    # Young's interval is a first approximation of Daly's, and nearly as good.
    young = save_interval.young_interval(save, mean_time)
    assert young == pytest.approx(daly, rel=math.sqrt(save / mean_time))
    assert save_interval.lost_share(young, save, mean_time, restart) == pytest.approx(least, rel=0.01)


def test_saves_that_take_longer_than_the_time_between_failures():
    assert save_interval.daly_interval(10.0, 4.0) == 4.0
    assert save_interval.lost_share(1e6, 1.0, 1.0) == 1.0


def test_a_job_fails_when_any_device_does():
    assert save_interval.job_mean_time(50_000.0, 1000) == 50.0


@pytest.mark.parametrize("call", [
    lambda: save_interval.young_interval(0.0, 1.0),
    lambda: save_interval.daly_interval(1.0, -1.0),
    lambda: save_interval.lost_share(0.0, 1.0, 1.0),
    lambda: save_interval.job_mean_time(1.0, 0),
])  # fmt: skip
def test_times_that_are_not_positive_are_refused(call):
    with pytest.raises(ValueError, match="positive"):
        call()
