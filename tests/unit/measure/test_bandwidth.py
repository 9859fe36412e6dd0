"""Bandwidth check: fits recover the values that were put in, and a real check runs on two gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tutorial_lib.measure import bandwidth
from tutorial_lib.measure.bandwidth import KINDS, SIZES, Link, Timing, fit_link

ROOT = Path(__file__).parents[3]
LINK = Link(latency=2e-4, bandwidth=1.5e9)


def timings(kind: str, num_ranks: int, link: Link = LINK) -> list[Timing]:
    """Return timings that a link explains exactly."""
    share = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}[kind] * (num_ranks - 1) / num_ranks
    return [Timing(kind, size, num_ranks, link.latency + share * size / link.bandwidth) for size in SIZES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_a_fit_finds_latency_and_bandwidth_of_a_ring(kind: str, num_ranks: int) -> None:
    found = fit_link(timings(kind, num_ranks))
    assert found.latency == pytest.approx(LINK.latency)
    assert found.bandwidth == pytest.approx(LINK.bandwidth)


def test_one_slow_call_does_not_change_the_fit() -> None:
    given = timings("all_reduce", 2)
    given[3] = Timing("all_reduce", given[3].num_bytes, 2, 20 * given[3].seconds)
    found = fit_link(given)
    assert found.latency == pytest.approx(LINK.latency, rel=0.2)
    assert found.bandwidth == pytest.approx(LINK.bandwidth, rel=0.2)


def test_a_latency_is_never_negative() -> None:
    given = [
        Timing("all_gather", size, 2, size / 2 / 1e9 * (1 - 0.3 / (1 + index))) for index, size in enumerate(SIZES)
    ]
    assert fit_link(given).latency == 0


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (timings("all_reduce", 2)[:1], "two sizes"),
        ([Timing("all_reduce", size, 1, 1e-6) for size in SIZES], "two ranks"),
        ([Timing("all_reduce", size, 2, 1 / size) for size in SIZES], "larger ones"),
    ],
)
def test_a_fit_refuses_timings_that_cannot_determine_it(given: list[Timing], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fit_link(given)


def test_the_gate_times_all_collectives_and_stops_a_job_on_a_slow_network() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    gate = ["-m", "tutorial_lib.measure.bandwidth", "--repeats", "2", "--at-least", "1e6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*torchrun, *gate], env=environment, capture_output=True, text=True, timeout=120)
    found = [Timing(**each) for each in json.loads(done.stdout)]
    assert [(each.kind, each.num_bytes) for each in found] == [(kind, size) for size in SIZES for kind in KINDS]
    assert all(each.num_ranks == 2 and each.seconds > 1e-6 + each.num_bytes / 1e12 for each in found), "1 TB/s at most"
    assert done.returncode != 0 and "less than the 1e+06 asked for" in done.stderr


def test_a_rank_that_fails_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs ``destroy_process_group`` waits for the other ranks, which wait for this one in a collective."""

    def fail(*_: object) -> None:
        raise MemoryError

    destroyed: list[bool] = []
    monkeypatch.setattr(bandwidth.dist, "init_process_group", lambda *_: None)
    monkeypatch.setattr(bandwidth.dist, "destroy_process_group", lambda: destroyed.append(True))
    monkeypatch.setattr(bandwidth, "time_collectives", fail)
    with pytest.raises(MemoryError):
        bandwidth.main([])
    assert not destroyed
