"""Two mistakes that make an FSDP2 job hang, with a timeout of four seconds instead of the usual ten minutes or more.

torchrun --standalone --nproc-per-node 2 hangs.py full_state_on_one_rank
torchrun --standalone --nproc-per-node 2 hangs.py save_on_one_rank
"""

import os
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

TIMEOUT = 4


def full_state_on_one_rank(model):
    """Gather the full weights under `if rank == 0`, as DDP scripts do."""
    if dist.get_rank() == 0:
        get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def save_on_one_rank(model):
    """Save shards under `if rank == 0`, the way an ordinary model is saved."""
    if dist.get_rank() == 0:
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tempfile.mkdtemp())


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # on a machine with GPUs, too
    model = fully_shard(torch.nn.Linear(8, 8), mesh=mesh)
    started = time.perf_counter()
    try:
        {"full_state_on_one_rank": full_state_on_one_rank, "save_on_one_rank": save_on_one_rank}[sys.argv[1]](model)
        time.sleep(2 * TIMEOUT)  # the other rank never joins, but stays connected until a slow rank 0 has given up
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        print(f"rank {dist.get_rank()} gave up after {time.perf_counter() - started:.0f} s: {reason}", flush=True)
    os._exit(0)  # the other rank never joined, so the group cannot be closed properly
