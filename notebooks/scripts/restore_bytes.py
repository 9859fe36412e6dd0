"""Bytes that each rank reads from the files of a checkpoint when a run resumes. Lesson 04 starts this script."""

import psutil
import torch.distributed as dist

from tutorial_lib.checkpoint import CheckpointManager
from tutorial_lib.config import Config
from tutorial_lib.dataloader import build_train_loader
from tutorial_lib.engine import build_engine
from tutorial_lib.models import load_tokenizer
from tutorial_lib.mpu import Topology


def count_bytes(settings):
    """Restore a run as its training loop does, train nothing, and return the bytes that each rank has read."""
    config = Config.from_json(settings["config"])
    topology = Topology.from_environment(config.parallel)
    loader = build_train_loader(config, load_tokenizer(config.model.name), topology)
    engine = build_engine(config, topology, loader.num_steps)
    checkpoints = CheckpointManager(config, engine, loader, topology)
    before = psutil.Process().io_counters().read_chars
    checkpoints.restore()
    read = psutil.Process().io_counters().read_chars - before
    checkpoints.close()
    engine.close()
    by_rank = [None] * topology.world_size
    dist.all_gather_object(by_rank, read)
    return by_rank
