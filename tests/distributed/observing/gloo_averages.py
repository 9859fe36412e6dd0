"""Averages over ranks, by gloo's all-reduce and reduce-scatter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def probe_averages(storage: Path) -> None:
    """Average the ranks' numbers 1, 2, ... with each collective, and write the outcomes to ``averages-N.pt``."""
    size, rank = dist.get_world_size(), dist.get_rank()
    target = storage / f"averages-{size}.pt"
    if target.exists():
        return
    outcomes: dict[str, Any] = {}
    for name, collective in {
        "all_reduce": lambda given, out: dist.all_reduce(out.copy_(given[: out.numel()]), op=dist.ReduceOp.AVG),
        "reduce_scatter_tensor": lambda given, out: dist.reduce_scatter_tensor(out, given, op=dist.ReduceOp.AVG),
        "reduce_scatter": lambda given, out: dist.reduce_scatter(out, list(given.chunk(size)), op=dist.ReduceOp.AVG),
    }.items():
        out = torch.zeros(3)
        try:
            collective(torch.full((3 * size,), rank + 1.0), out)
            outcomes[name] = out
        except (RuntimeError, ValueError) as error:
            outcomes[name] = str(error)
    dist.barrier()
    if rank == 0:
        torch.save(outcomes, target)
