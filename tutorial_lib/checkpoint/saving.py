"""Save a run's state and restore it: every rank writes its own share, and the whole becomes visible at once."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutorial_lib.checkpoint.continuing import check_same_run, shape
from tutorial_lib.checkpoint.files import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    barrier,
    digests,
    directory_of,
    read_trainer_state,
    sync,
    verify,
)
from tutorial_lib.checkpoint.whole import open_whole
from tutorial_lib.config import Config
from tutorial_lib.fused import is_fused_by_part
from tutorial_lib.mpu import Topology
from tutorial_lib.records import RunDirectory, write_atomically


@dataclass(frozen=True, slots=True)
class Progress:
    """What a resumed run needs besides the engine's own state.

    Attributes:
        step: optimizer steps done.
        loader: this rank's data position, as the loader gives it.
        scheduler: the learning-rate schedule's state.
        record: what the trainer wants to find again (JSON).
        reshaped_from: the shape in which it was saved, if the run goes on in another one.
    """

    step: int
    loader: dict[str, Any]
    scheduler: dict[str, Any]
    record: dict[str, Any]
    reshaped_from: dict[str, Any] | None = None


def save(
    run: RunDirectory, engine: Any, config: Config, topology: Topology, progress: Progress, tokenizer: Any
) -> Path:
    """Write a checkpoint. Collective; returns when it is complete and visible to all ranks.

    Args:
        run: the run's directory, on storage that every rank sees.
        engine: anything with ``save(directory)`` and ``module``.
        config: settings of the run, kept for the resume to compare.
        topology: this rank's place in the grid.
        progress: step, data position, schedule.
        tokenizer: saved beside the model's configuration, for exports.

    Raises:
        CheckpointError: some rank's files are not visible here: the storage is not shared.
    """
    final = directory_of(run, progress.step)
    partial = run.checkpoints / f".partial-{final.name}"
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save(partial / "engine")
    torch.save(
        {"loader": progress.loader, "random": _random_states(engine)},
        partial / f"rank-{topology.rank:03d}.pt",
    )
    if topology.rank == 0:
        engine.module.config.save_pretrained(partial / "model")
        tokenizer.save_pretrained(partial / "model")
        trainer = {
            "format": FORMAT,
            "step": progress.step,
            "scheduler": progress.scheduler,
            "record": progress.record,
            # A checkpoint does not know where it lies: its run may be moved.
            "config": {name: value for name, value in config.flat().items() if name != "storage"},
            "world_size": topology.world_size,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")},
        }
        (partial / "trainer.json").write_text(json.dumps(trainer, indent=2), encoding="utf-8")
    barrier()
    files = digests(partial, topology)
    if topology.rank == 0:
        missing = [r for r in range(topology.world_size) if f"rank-{r:03d}.pt" not in files]
        if missing:
            raise CheckpointError(
                f"The files of ranks {missing} are not visible in {partial}. The storage must be one that every node "
                "sees, such as a network file system: choose another --storage."
            )
        write_atomically(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
        sync(partial / MANIFEST)
        sync(partial)
        # A save of the same step by an earlier start of this run is replaced as a whole.
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync(run.checkpoints)
    barrier()
    return final


def load(path: Path, engine: Any, config: Config, topology: Topology) -> Progress:
    """Verify a checkpoint, then restore the engine and this rank's random-number states. Collective.

    A run may go on in another shape than the one that it was saved in: with another number of ranks, another engine,
    ZeRO stage, sharding or offload. Then

    - weights, both moments and Adam's count of updates are those that were saved, bit for bit; of weights in 16 bits,
      the fp32 master copies are, and the 16-bit ones are rounded from them anew;
    - the position in the data is that of every rank: it counts steps of the global batch;
    - random-number states are *not* restored, as they belong to ranks that are no more: the caller has to seed anew;
    - fp16's dynamic loss scale starts at its first value again, and the updates that overflow until it has come down
      are skipped.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: the checkpoint belongs to other settings.
    """
    verify(path, topology)
    trainer = read_trainer_state(path)
    check_same_run(trainer["config"], config)
    saved, wanted = shape(trainer["config"]), shape(config.flat())
    reshaped_from = saved if saved != wanted else None
    own = torch.load(path / f"rank-{0 if reshaped_from else topology.rank:03d}.pt", weights_only=True)
    if reshaped_from is None or _dcp_reshards(saved, wanted, engine.module):
        engine.load(path / "engine")
    else:
        engine.load_whole(open_whole(path))
    if reshaped_from is None:
        _restore_random_states(own["random"], engine)
    return Progress(trainer["step"], own["loader"], trainer["scheduler"], trainer["record"], reshaped_from)


def _dcp_reshards(saved: dict[str, Any], wanted: dict[str, Any], model: Any) -> bool:
    """Whether FSDP's own files can be read in the new shape as they are: each rank then reads its share alone."""
    fused = any(is_fused_by_part(name, model.config.model_type) for name, _ in model.named_parameters())
    # The columns of a fused matrix are stored in the order of the tensor-parallel ranks.
    return saved["engine"] == wanted["engine"] == "fsdp" and (saved["tp"] == wanted["tp"] or not fused)


def _random_states(engine: Any) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.device)
    return states


def _restore_random_states(states: dict[str, Any], engine: Any) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], engine.device)
