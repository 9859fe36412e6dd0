"""Write a profiler trace of rank 0's step, for Chrome's trace viewer or Perfetto.

torchrun --standalone --nproc-per-node 2 trace_fsdp.py gpt2 trace.json
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import profile

if __name__ == "__main__":
    from train_fsdp import build_model  # next to this script

    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))  # sets up the process group
    model = build_model(sys.argv[1], mesh, torch.float32)
    tokens = torch.arange(8 * 128).view(8, 128)
    for _ in range(2):  # the first steps allocate
        model(tokens).logits.square().mean().backward()
    with profile(profile_memory=True) as trace:
        model(tokens).logits.square().mean().backward()
    if dist.get_rank() == 0:
        trace.export_chrome_trace(sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
