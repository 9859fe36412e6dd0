"""Known collectives for test_traffic.py, run and counted on two gloo ranks; the counts go to a JSON file.

Arguments: rank, the store's file, the output's file.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tutorial_lib.measure.traffic import Traffic, count_collectives

warnings.simplefilter("ignore")
N = 2


def each_kind(rank: int) -> Traffic:
    """Run one collective of each kind, each with a different number of elements."""
    with count_collectives() as traffic:
        dist.all_reduce(torch.ones(101))
        dist.all_reduce_coalesced([torch.ones(50), torch.ones(52)])
        functional.all_reduce(torch.ones(103), "sum", dist.group.WORLD).wait()
        dist.broadcast(torch.ones(201), 0)
        dist.reduce(torch.ones(301), 0)
        dist.all_gather([torch.empty(401) for _ in range(N)], torch.ones(401))
        dist.all_gather_into_tensor(torch.empty(N * 402), torch.ones(402))
        functional.all_gather_tensor(torch.ones(403), 0, dist.group.WORLD).sum()
        dist.reduce_scatter_tensor(torch.empty(501), torch.ones(N * 501))
        dist.reduce_scatter(torch.empty(502), [torch.ones(502) for _ in range(N)])
        functional.reduce_scatter_tensor(torch.ones(N * 503), "sum", 0, dist.group.WORLD).sum()
        dist.all_to_all_single(torch.empty(N * 600), torch.ones(N * 600))
        dist.gather(torch.ones(701), [torch.empty(701) for _ in range(N)] if rank == 0 else None, 0)
        dist.scatter(torch.empty(801), [torch.ones(801) for _ in range(N)] if rank == 0 else None, 0)
        if rank == 0:
            dist.send(torch.ones(901), 1)
        else:
            dist.recv(torch.empty(901), 0)
    return traffic


def bookkeeping() -> Traffic:
    """Send a bf16 tensor, and for bookkeeping a loss, a float64 norm, an object, integers and a barrier."""
    with count_collectives() as traffic:
        dist.all_reduce(torch.ones(64, dtype=torch.bfloat16), async_op=True).wait()
        dist.all_reduce(torch.ones(()))
        dist.all_reduce(torch.ones(2, dtype=torch.float64))
        dist.all_gather_object([None] * N, {"rank": 0})
        dist.all_reduce(torch.ones(1000, dtype=torch.int64))
        dist.barrier()
    return traffic


def in_backward() -> Traffic:
    """Reduce a gradient in a hook while backward runs, and count nothing outside the block."""
    weight = torch.ones(77, requires_grad=True)
    weight.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    dist.all_reduce(torch.ones(55))
    with count_collectives() as traffic:
        (weight * 2).sum().backward()
    dist.all_reduce(torch.ones(55))
    assert weight.grad is not None and weight.grad.tolist() == [4.0] * 77
    return traffic


def of_one_rank() -> Traffic:
    groups = [dist.new_group([rank]) for rank in range(N)]
    with count_collectives() as traffic:
        dist.all_reduce(torch.ones(100), group=groups[dist.get_rank()])
    return traffic


def along_axes(rank: int) -> Traffic:
    """All-reduce over both ranks, which form the ``tp`` axis, and over a group of one rank, its ``dp`` axis."""
    groups = [dist.new_group([alone]) for alone in range(N)]
    mesh = init_device_mesh("cpu", (N,))
    with count_collectives({"tp": [0, 1], "dp": [rank]}) as traffic:
        dist.all_reduce(torch.ones(100))
        functional.all_reduce(torch.ones(10), "sum", mesh).wait()
        dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(50), group=groups[rank])
    return traffic


def fsdp_and_tensor_parallel() -> tuple[Traffic, Traffic]:
    """Run FSDP2 over two layers of 128 weights each, and a column- and a row-parallel layer on three rows of 8."""
    mesh = init_device_mesh("cpu", (N,))

    def model() -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Linear(8, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 8, bias=False)
        )

    sharded = model()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    with count_collectives() as fsdp:
        sharded(torch.ones(3, 8)).sum().backward()

    split = parallelize_module(model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with count_collectives() as tensor_parallel:
        split(torch.ones(3, 8, requires_grad=True)).sum().backward()
    return fsdp, tensor_parallel


def inside_an_operator() -> Traffic:
    """Add rows to columns, so that the DTensor operator itself has to redistribute one of them."""
    mesh = init_device_mesh("cpu", (N,))
    rows, columns = (distribute_tensor(torch.ones(8, 8), mesh, [Shard(dim)]) for dim in (0, 1))
    with count_collectives() as traffic:
        rows + columns
    return traffic


def main() -> None:
    rank, store, output = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=N)
    fsdp, tensor_parallel = fsdp_and_tensor_parallel()
    counted = {
        "each_kind": each_kind(rank),
        "bookkeeping": bookkeeping(),
        "in_backward": in_backward(),
        "of_one_rank": of_one_rank(),
        "along_axes": along_axes(rank),
        "fsdp": fsdp,
        "tensor_parallel": tensor_parallel,
        "inside_an_operator": inside_an_operator(),
    }
    output.write_text(json.dumps({name: _describe(traffic) for name, traffic in counted.items()}))
    dist.destroy_process_group()


def _describe(traffic: Traffic) -> dict[str, Any]:
    kinds = {c.kind for c in traffic.collectives}
    return {
        "elements": {kind: [c.elements for c in traffic.collectives if c.kind == kind] for kind in kinds},
        "volume": traffic.volume(),
        "wire_bytes": traffic.wire_bytes(),
        "dict": traffic.to_dict(),
    }


if __name__ == "__main__":
    main()
