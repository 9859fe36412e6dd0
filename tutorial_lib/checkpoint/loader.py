"""Loading a run from a verified checkpoint, in the shape that it was saved in or in a different one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tutorial_lib.checkpoint.compatibility import check_same_run, shape
from tutorial_lib.checkpoint.formats import open_full
from tutorial_lib.checkpoint.manifest import read_trainer_state
from tutorial_lib.checkpoint.saver import Progress
from tutorial_lib.config import Config
from tutorial_lib.models.fused_qkv import is_fused_by_part
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.random_states import restore_random_states


def load(path: Path, engine: Any, config: Config, topology: Topology) -> Progress:
    """Restore the engine and this rank's random-number states from a checkpoint that was verified. Collective.

    A run may go on in another shape than the one that it was saved in: with another number of ranks, another engine,
    ZeRO stage, sharding or offload. Then

    - weights, both moments and Adam's count of updates are those that were saved, bit for bit; of weights in 16 bits,
      the fp32 master copies are, and the 16-bit ones are rounded from them anew;
    - the position in the data is that of every rank: it counts steps of the global batch;
    - random-number states are *not* restored, as they belong to ranks that are no more: the caller has to seed anew;
    - fp16's dynamic loss scale starts at its first value again, and the updates that overflow until it has come down
      are skipped.

    Raises:
        CheckpointError: the engine found nothing to load.
        ConfigError: the checkpoint belongs to other settings.
    """
    trainer = read_trainer_state(path)
    check_same_run(trainer["config"], config)
    saved, wanted = shape(trainer["config"]), shape(config.flat())
    reshaped_from = saved if saved != wanted else None
    own = torch.load(path / f"rank-{0 if reshaped_from else topology.rank:03d}.pt", weights_only=True)
    if reshaped_from is None or _dcp_reshards(saved, wanted, engine.module):
        engine.load(path / "engine")
    else:
        engine.load_full(open_full(path, verified=True))
    if reshaped_from is None:
        restore_random_states(own["random"], engine.device)
    return Progress(
        trainer["step"], own["loader"], trainer["scheduler"], trainer["record"], reshaped_from=reshaped_from
    )


def _dcp_reshards(saved: dict[str, Any], wanted: dict[str, Any], model: Any) -> bool:
    """Whether FSDP's own files can be read in the new shape as they are: each rank then reads its share alone."""
    fused = any(is_fused_by_part(name, model.config.model_type) for name, _ in model.named_parameters())
    # The columns of a fused matrix are stored in the order of the tensor-parallel ranks.
    return saved["engine"] == wanted["engine"] == "fsdp" and (saved["tp"] == wanted["tp"] or not fused)
