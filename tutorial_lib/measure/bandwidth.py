"""Bandwidth check: the time of collectives by size, and the latency and bandwidth that explain it.

Run it on the nodes of a job before the job, with the job's own launcher::

    torchrun --nnodes 2 --nproc-per-node 8 ... -m tutorial_lib.measure.bandwidth --at-least 20

It prints one JSON line, and fails if an all-reduce is slower than the given GB/s, so that a bad cable costs a minute
instead of a night.

The model of a collective is ``t = a + s / b``: a latency, in seconds, and the bytes ``s`` that each rank of a ring
sends (:func:`tutorial_lib.theory.traffic.ring_factor`) over the bandwidth ``b``, in bytes per second.

Sources: Hockney, "The communication challenge for MPP", Parallel Computing 20(3), 1994, for the model; ``b`` is the
"bus bandwidth" of nccl-tests (doc/PERFORMANCE.md there).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from tutorial_lib.theory.traffic import ring_factor

KINDS = ("all_reduce", "all_gather", "reduce_scatter")
SIZES = tuple(4**power for power in range(5, 13))
"""Sizes of the full tensor, from 1 KiB to 16 MiB, in bytes. A rank's share is rounded down to whole elements."""

Collective = Callable[[torch.Tensor, torch.Tensor], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of a collective.

    Attributes:
        kind: one of :data:`KINDS`.
        num_bytes: size of the full tensor.
        num_ranks: number of ranks that take part.
        seconds: time of one call on the slowest rank, as the median of many.
    """

    kind: str
    num_bytes: int
    num_ranks: int
    seconds: float

    @property
    def sent_bytes(self) -> float:
        """Bytes that each rank of a ring sends."""
        return ring_factor(self.kind, self.num_ranks) * self.num_bytes


@dataclass(frozen=True, slots=True)
class Link:
    """Model of the times of a collective: ``latency`` in seconds, ``bandwidth`` in bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, sent_bytes: float) -> float:
        """Return the time of a collective in which each rank sends this many bytes."""
        return self.latency + sent_bytes / self.bandwidth


def time_collectives(repeats: int, device: torch.device) -> list[Timing]:
    """Time collectives of the default process group, of all :data:`KINDS` and :data:`SIZES`. Collective.

    Args:
        repeats: calls of each collective; the result is their median.
        device: where the tensors are; ``cuda`` with NCCL.

    Returns:
        The same timings on every rank.
    """
    num_ranks = dist.get_world_size()
    timings = []
    for num_bytes in SIZES:
        shard = torch.ones(max(1, num_bytes // 4 // num_ranks), device=device)
        full = torch.ones(num_ranks * shard.numel(), device=device)
        for kind in KINDS:
            seconds = torch.tensor(_median_seconds(_CALLS[kind], full, shard, repeats), device=device)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            timings.append(Timing(kind, 4 * full.numel(), num_ranks, seconds.item()))
    return timings


def fit_link(timings: Sequence[Timing]) -> Link:
    """Fit the latency and bandwidth that best explain the timings, by least squares of relative errors.

    Errors are relative because times differ a thousandfold, and every size should have the same weight. The latency is
    never below 0.

    Args:
        timings: timings of one kind, with at least two sizes, on at least two ranks.

    Raises:
        ValueError: there are fewer than two sizes or ranks, or large tensors take no longer than small ones.
    """
    sent = [each.sent_bytes for each in timings]
    if len(set(sent)) < 2 or min(sent) <= 0:
        raise ValueError("A fit needs times of at least two sizes, on at least two ranks.")
    # Minimise the sum of ((a + s / b) / t - 1)^2, which is linear in a and 1 / b.
    x = [1 / each.seconds for each in timings]
    y = [s / each.seconds for s, each in zip(sent, timings, strict=True)]
    xx, yy = sum(v * v for v in x), sum(v * v for v in y)
    xy = sum(v * w for v, w in zip(x, y, strict=True))
    determinant = xx * yy - xy * xy
    latency, per_byte = (yy * sum(x) - xy * sum(y)) / determinant, (xx * sum(y) - xy * sum(x)) / determinant
    if latency < 0:
        latency, per_byte = 0.0, sum(y) / yy
    if per_byte <= 0:
        raise ValueError("The largest tensor takes no longer than the smallest: time larger ones.")
    return Link(latency, 1 / per_byte)


def main(arguments: Sequence[str] | None = None) -> int:
    """Time collectives as one rank that torchrun started; rank 0 prints one JSON line. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--at-least", type=float, default=0.0, metavar="GB/S", help="fail below this")
    parser.add_argument(
        "--repeats", type=int, default=15, metavar="N", help="number of calls for each size (default: 15)"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    timings = time_collectives(options.repeats, device)
    if dist.get_rank() == 0:
        print(json.dumps([asdict(each) for each in timings]), flush=True)
    reached = fit_link([each for each in timings if each.kind == "all_reduce"]).bandwidth / 1e9
    dist.destroy_process_group()  # not after an error: NCCL would wait for ranks that may wait for this one
    if reached < options.at_least:
        print(f"all_reduce reaches {reached:.3g} GB/s, less than the {options.at_least:g} asked for.", file=sys.stderr)
        return 1
    return 0


_CALLS: dict[str, Collective] = {
    "all_reduce": lambda full, shard: dist.all_reduce(full),
    "all_gather": lambda full, shard: dist.all_gather_single(full, shard),
    "reduce_scatter": lambda full, shard: dist.reduce_scatter_single(shard, full),
}


def _median_seconds(call: Collective, full: torch.Tensor, shard: torch.Tensor, repeats: int) -> float:
    wait = torch.cuda.synchronize if full.is_cuda else lambda: None
    times = []
    for _ in range(1 + repeats):  # the first one allocates and connects
        full.fill_(1.0)  # repeated sums would overflow
        shard.fill_(1.0)
        wait()
        dist.barrier()
        began = time.perf_counter()
        call(full, shard)
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


if __name__ == "__main__":
    sys.exit(main())
