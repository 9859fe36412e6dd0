"""Checkpoint interval: the best compromise between the time that saving takes and the work that a failure loses.

Notation: C, seconds that training stalls for one save; M, mean seconds between failures of the whole job; R, seconds
from a failure to the first step afterwards; tau, seconds of training between two saves. Failures are random and
independent of each other, at the rate 1/M.

Sources: Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; Daly, "A higher
order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006.

Checked: against :func:`simulate_lost_share`, in ``tests/unit/theory/test_save_interval.py``.
"""

from __future__ import annotations

import math
import random


def job_mean_time(device_mean_time: float, num_devices: int) -> float:
    """Return the mean time between failures of a job, which fails when any of its devices does: M = M_device / N."""
    if device_mean_time <= 0 or num_devices < 1:
        raise ValueError(f"device_mean_time={device_mean_time} and num_devices={num_devices}: both must be positive.")
    return device_mean_time / num_devices


def young_interval(save_seconds: float, mean_time: float) -> float:
    """Return Young's interval, sqrt(2 C M): seconds of training between two saves; accurate if C is far below M."""
    _check(save_seconds, mean_time)
    return math.sqrt(2 * save_seconds * mean_time)


def daly_interval(save_seconds: float, mean_time: float) -> float:
    """Return Daly's interval: Young's with the next two terms, minus C; or M if a save takes 2 M or longer."""
    _check(save_seconds, mean_time)
    share = save_seconds / (2 * mean_time)
    if share >= 1:
        return mean_time
    return math.sqrt(2 * save_seconds * mean_time) * (1 + math.sqrt(share) / 3 + share / 9) - save_seconds


def lost_share(interval: float, save_seconds: float, mean_time: float, restart_seconds: float = 0.0) -> float:
    """Return the share of the wall time that is lost when a run saves after every ``interval`` seconds of training.

    Daly's model of the wall time is exact for failures at a constant rate, which may also happen during a save or a
    restart: one second of training takes ``M e^(R/M) (e^((tau + C)/M) - 1) / tau`` seconds of wall time.

    Args:
        interval: tau, seconds of training between two saves.
        save_seconds: C, seconds that training stalls for one save.
        mean_time: M, mean seconds between failures.
        restart_seconds: R, seconds from a failure to the first step afterwards.
    """
    _check(save_seconds, mean_time)
    if interval <= 0:
        raise ValueError(f"interval={interval} s between saves: write a positive number.")
    exponent = (interval + save_seconds) / mean_time
    if exponent + restart_seconds / mean_time > 700:  # about the largest exponent for a float: nothing gets done
        return 1.0
    wall = mean_time * math.exp(restart_seconds / mean_time) * math.expm1(exponent) / interval
    return 1 - 1 / wall


def simulate_lost_share(
    interval: float,
    save_seconds: float,
    mean_time: float,
    restart_seconds: float = 0.0,
    *,
    num_saves: int = 20_000,
    seed: int = 0,
) -> float:
    """Simulate :func:`lost_share`: draw random failures until ``num_saves`` intervals are trained and saved."""
    _check(save_seconds, mean_time)
    draw = random.Random(seed)
    wall, done = 0.0, 0
    until_failure = draw.expovariate(1 / mean_time)
    while done < num_saves:
        if until_failure >= interval + save_seconds:
            wall, until_failure, done = (
                wall + interval + save_seconds,
                until_failure - interval - save_seconds,
                done + 1,
            )
            continue
        wall += until_failure
        # A restart may fail as well, and then starts over.
        while (until_failure := draw.expovariate(1 / mean_time)) < restart_seconds:
            wall += until_failure
        wall, until_failure = wall + restart_seconds, until_failure - restart_seconds
    return 1 - num_saves * interval / wall


def _check(save_seconds: float, mean_time: float) -> None:
    if save_seconds <= 0 or mean_time <= 0:
        raise ValueError(
            f"save_seconds={save_seconds} and mean_time={mean_time}: both must be positive numbers of seconds."
        )
