"""Fine-tune a causal language model with FSDP2, using only PyTorch and transformers.

    torchrun --standalone --nproc-per-node 2 train_fsdp.py --model gpt2 --text corpus.txt --directory run --steps 20

Start it again with the same directory, on any number of ranks: it resumes from its newest checkpoint.
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
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def build_model(path, mesh, precision):
    """Shard a model on the meta device, then load its weights: only rank 0's host memory ever holds the full model."""
    with torch.device("meta"):  # code and shapes, no memory
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for unit in [*layers, model]:  # layers first; the last call takes what is left: embeddings and the last norm
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    model.to_empty(device=mesh.device_type)  # memory for this rank's shards
    model.tie_weights()  # to_empty gave tied embeddings a tensor each
    model.init_weights()  # buffers such as rotary frequencies are not among the stored weights
    # Rank 0 reads the files and broadcasts one tensor at a time; each rank keeps its shard.
    full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict() if dist.get_rank() == 0 else {}
    sd.set_model_state_dict(model, full, options=sd.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model.train()


def read_rows(path, tokenizer, length):
    """Cut a text into rows of `length` tokens."""
    tokens = torch.tensor(tokenizer(path.read_text(), verbose=False)["input_ids"])
    return tokens[: len(tokens) // length * length].view(-1, length)


class TrainingState:
    """The state that a resume needs. DCP takes any object with these two methods; each rank writes its shards."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self):
        model, optimizer = sd.get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, saved):
        sd.set_state_dict(
            self.model, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
        )
        self.step = saved["step"]


def train(options, mesh):
    """Train, or continue, up to step `options.steps`."""
    rank, device = dist.get_rank(), mesh.device_type
    model = build_model(options.model, mesh, torch.bfloat16 if device == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)  # after sharding, or it updates nothing
    state = TrainingState(model, optimizer)
    if saved := sorted(options.directory.glob("step-*/.metadata")):  # written last: without it a save is incomplete
        dcp.load({"training": state}, checkpoint_id=saved[-1].parent)
    rows = read_rows(options.text, AutoTokenizer.from_pretrained(options.model), options.seq_length)
    share, rest = divmod(options.global_batch, mesh.size())
    assert rest == 0, f"--global-batch {options.global_batch} is not divisible by {mesh.size()} ranks"
    while state.step < options.steps:
        first = state.step * options.global_batch + rank * share  # the global batch does not depend on the ranks
        tokens = rows[torch.arange(first, first + share) % len(rows)].to(device)
        logits = model(tokens, use_cache=False).logits[:, :-1].float()
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # averages gradients over the ranks, each of which keeps its shard
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of all ranks' shards together
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)  # every rank calls it, one rank prints
        if rank == 0:
            print(f"step {state.step} loss {loss.item():.7f}", flush=True)
        if state.step % options.save_every == 0 or state.step == options.steps:
            dcp.save({"training": state}, checkpoint_id=options.directory / f"step-{state.step:06}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind in {"model": str, "text": Path, "directory": Path}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name, value in {"steps": 20, "save-every": 10, "global-batch": 16, "seq-length": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(parser.parse_args(), init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),)))  # sets up the process group
    dist.destroy_process_group()
