"""Profiler trace of one training step, for Chrome's trace viewer or Perfetto. Lesson 01 starts it."""

import time
from pathlib import Path

from torch.profiler import profile, record_function

from tutorial_lib.config import Config
from tutorial_lib.dataloader import build_train_loader
from tutorial_lib.engine import build_engine
from tutorial_lib.models import load_tokenizer
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer import count_tokens, token_loss_sum


def trace_step(settings):
    """Train a run's steps, keep rank 0's trace of the fastest one, and return the trace's path."""
    config = Config.from_json(settings["config"])
    topology = Topology.from_environment(config.parallel)
    loader = build_train_loader(config, load_tokenizer(config.model.name), topology)
    engine = build_engine(config, topology, loader.num_steps)
    path, fastest = Path(config.directory) / "trace.json", float("inf")
    for _, (batch,) in loader.steps():
        tokens = count_tokens([batch], topology)
        with profile(profile_memory=True, record_shapes=True) as trace:
            began = time.perf_counter()
            with record_function("forward"):
                loss = token_loss_sum(engine.forward(batch), batch["labels"]) / tokens
            with record_function("backward"):
                engine.backward(loss)
            with record_function("update"):
                engine.step()
            seconds = time.perf_counter() - began
        if topology.rank == 0 and seconds < fastest:  # the slower ones waited for other programs, or set things up
            fastest = seconds
            trace.export_chrome_trace(str(path))
    engine.close()
    return str(path)
