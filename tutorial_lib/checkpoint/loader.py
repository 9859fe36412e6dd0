"""Loading of a verified checkpoint, in the shape that it was saved in or in a different one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tutorial_lib.checkpoint.compatibility import shape
from tutorial_lib.checkpoint.formats import open_full
from tutorial_lib.checkpoint.manifest import read_trainer_state
from tutorial_lib.checkpoint.saver import TrainingState
from tutorial_lib.config import Config
from tutorial_lib.models.fused_qkv import is_fused_by_part
from tutorial_lib.mpu import Topology
from tutorial_lib.mpu.random_states import restore_random_states


def load(path: Path, engine: Any, config: Config, topology: Topology) -> TrainingState:
    """Restore the engine and this rank's random-number states from a verified checkpoint. Collective.

    A run may resume in a different shape: number of ranks, engine, ZeRO stage, sharding or offload. In that case:

    - weights, buffers, both moments and Adam's count of updates are restored bit for bit; for weights in 16 bits this
      holds for the fp32 master copies, and the 16-bit weights are rounded from them;
    - the position in the data is the same for every rank, because it counts steps of the global batch;
    - random-number states are *not* restored, because the ranks are different: the caller must seed again;
    - fp16's dynamic loss scale starts from its initial value, and updates are skipped until it has come down.

    Raises:
        CheckpointError: the engine found nothing to load, or the files do not match the model's configuration.
    """
    trainer = read_trainer_state(path)
    saved, wanted = shape(trainer["config"]), shape(config.flat())
    reshaped_from = saved if saved != wanted else None
    own = torch.load(path / f"rank-{0 if reshaped_from else topology.rank:03d}.pt", weights_only=True)
    if reshaped_from is None or _dcp_reshards(saved, wanted, engine.module):
        engine.load(path / "engine")
    else:
        engine.load_full(open_full(path, verified=True))
    if reshaped_from is None:
        restore_random_states(own["random"], engine.device)
    return TrainingState(
        trainer["step"], own["loader"], trainer["scheduler"], trainer["record"], reshaped_from=reshaped_from
    )


def _dcp_reshards(saved: dict[str, Any], wanted: dict[str, Any], model: Any) -> bool:
    """Return whether FSDP's files can be read directly in the new shape, with each rank reading only its share."""
    fused = any(is_fused_by_part(name, model.config.model_type) for name, _ in model.named_parameters())
    # A fused matrix is stored with its columns in the order of the tensor-parallel ranks.
    return saved["engine"] == wanted["engine"] == "fsdp" and (saved["tp"] == wanted["tp"] or not fused)
