"""Fine-tune a causal language model on a grid of ranks, tensor parallel x FSDP2, using only PyTorch and transformers.

    torchrun --standalone --nproc-per-node 4 train_2d.py --tp 2 --model Qwen/Qwen2.5-0.5B --text FILE --directory run

Start it again with the same directory, on any grid: it resumes from its newest checkpoint.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as sd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def split_layer(layer, mesh):
    """Split attention and MLP over a mesh of tensor-parallel ranks, each by columns, then by rows."""
    same, hidden = Replicate(), {"hidden_states": Replicate()}
    plan = {  # gradients of q, k and v add up at attention's input, and cross the group once
        "self_attn": PrepareModuleInput(input_kwarg_layouts=hidden, desired_input_kwarg_layouts=hidden),
        "mlp": PrepareModuleInput(input_layouts=same, desired_input_layouts=same),
    }
    plan |= {f"self_attn.{name}_proj": ColwiseParallel() for name in ("q", "k", "v")}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {f"{name}_proj": RowwiseParallel() for name in ("self_attn.o", "mlp.down")}  # each ends with an all-reduce
    parallelize_module(layer, mesh, plan)


def build_model(path, mesh, precision=torch.float32):
    """Split the layers over the axis tp, shard each rank's part over the axis dp, then load the weights."""
    config = AutoConfig.from_pretrained(path)
    assert config.model_type in ("llama", "mistral", "qwen2"), f"split_layer has no plan for {config.model_type}"
    assert config.num_key_value_heads % mesh["tp"].size() == 0, "--tp must divide the number of key-value heads"
    with torch.device("meta"):  # code and shapes, no memory
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        split_layer(layer, mesh["tp"])
    for unit in [*model.model.layers, model]:  # embeddings and norms are full on every tensor-parallel rank
        fully_shard(unit, mesh=mesh["dp"], mp_policy=policy)
    model.to_empty(device=mesh.device_type).tie_weights()
    model.init_weights()  # buffers such as rotary frequencies are not among the stored weights
    full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict() if dist.get_rank() == 0 else {}
    sd.set_model_state_dict(model, full, options=sd.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model.train()


def train(options, mesh):
    """Train, or continue, up to step `options.steps`."""
    device, dp = mesh.device_type, mesh["dp"]
    model = build_model(options.model, mesh, torch.bfloat16 if device == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, foreach=False)  # foreach cannot mix meshes
    start, names = 0, ("model_state_dict", "optim_state_dict")
    if saved := sorted(options.directory.glob("step-*/.metadata")):  # written last: without it a save is incomplete
        states = dict(zip(names, sd.get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=saved[-1].parent)
        sd.set_state_dict(model, optimizer, **states)
        start = int(saved[-1].parent.name.removeprefix("step-"))
    text = AutoTokenizer.from_pretrained(options.model)(options.text.read_text(), verbose=False)
    rows = torch.tensor(text["input_ids"]).unfold(0, options.seq_length, options.seq_length)
    assert options.global_batch % dp.size() == 0, f"--global-batch must be a multiple of dp = {dp.size()}"
    mine = torch.arange(options.global_batch).chunk(dp.size())[dp.get_local_rank()]  # by dp rank, never by world rank
    for step in range(start, options.steps):
        tokens = rows[(step * options.global_batch + mine) % len(rows)].to(device)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        groups = [[p for p in model.parameters() if p.device_mesh.ndim == n] for n in (1, 2)]  # by mesh
        norms = [get_total_norm([p.grad for p in group]).full_tensor() for group in groups]
        for group in groups:
            clip_grads_with_norm_(group, 1.0, torch.stack(norms).norm())
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)
        if dist.get_rank() == 0:
            print(f"step {step + 1} loss {loss.item():.7f}", flush=True)
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            states = dict(zip(names, sd.get_state_dict(model, optimizer), strict=True))
            dcp.save(states, checkpoint_id=options.directory / f"step-{step + 1:06}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind in {"model": str, "text": Path, "directory": Path}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    defaults = {"tp": 2, "steps": 20, "save-every": 10, "global-batch": 16, "seq-length": 128, "learning-rate": 1e-3}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args, device = parser.parse_args(), "cuda" if torch.cuda.is_available() else "cpu"
    shape = (int(os.environ["WORLD_SIZE"]) // args.tp, args.tp)
    train(args, init_device_mesh(device, shape, mesh_dim_names=("dp", "tp")))  # sets up the process group
    dist.destroy_process_group()
