"""A small model, runs of it with the torch engine, and the comparison of two of them."""

import json

import torch

from tests.support.models import MODELS, small_model
from tutorial_lib import checkpoint
from tutorial_lib.checkpoint import manifest
from tutorial_lib.checkpoint.directory import finish_deletions
from tutorial_lib.config import Config
from tutorial_lib.mpu import Topology

STEPS = 7
"""Steps of a run, in epochs of three steps."""


def config(storage, **flat):
    settings = {"engine": "torch", "dp": 1, "launcher": "none", "steps": STEPS, "global_batch": 4, "seq_length": 32}
    settings |= {
        "max_examples": 13,
        "evaluate": False,
        "schedule": "constant",
        "warmup_steps": min(2, flat.get("steps") or STEPS),
        "storage": str(storage),
    }
    return Config.create("cpu", **(settings | flat))


def make_model(directory):
    """Write a small GPT-2 with dropout, so that a resume with different random numbers gives different losses."""
    small_model("gpt2", directory / "dropout", **MODELS["gpt2"], embd_pdrop=0.1, resid_pdrop=0.1)
    return str(directory / "dropout")


def make_checkpoint(run, step, **trainer):
    """Write the smallest intact checkpoint, without training anything."""
    path = checkpoint.directory_of(run, step)
    path.mkdir()
    (path / "trainer.json").write_text(json.dumps({"format": 2, "step": step, "record": {}} | trainer))
    listed = {"trainer.json": manifest.file_entry(path / "trainer.json")}
    (path / manifest.MANIFEST).write_text(json.dumps({"format": 2, "files": listed}))
    return path


def weights(run):
    return torch.load(checkpoint.latest(run.directory) / "engine" / "model.pt", weights_only=True)


def rows_without_seconds(run):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.rows]


def assert_same(run, expected):
    assert rows_without_seconds(run) == rows_without_seconds(expected)
    assert all(tensor.equal(weights(expected)[name]) for name, tensor in weights(run).items())


ALONE = Topology(dp=1, tp=1, rank=0)


def names(run):
    finish_deletions()
    return sorted(path.name for path in run.checkpoints.iterdir())


def steps(*numbers):
    return [f"step-{number:08d}" for number in numbers]
