"""Reports to Ray Train: metrics, and checkpoints that are already in their final place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def report(metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
    """Report a step and, if there is one, a complete checkpoint to Ray Train. Collective.

    Outside a function that Ray Train runs, such as under torchrun, this does nothing. Ray copies no files: each rank
    has written its own directly to the run's directory.

    Args:
        metrics: numbers and strings; Ray keeps them with the checkpoint.
        checkpoint: directory of the checkpoint.
    """
    if not _is_ray_worker():
        return
    import ray.train
    from ray.train.v2.api.report_config import CheckpointUploadMode

    given = ray.train.Checkpoint(str(checkpoint.resolve())) if checkpoint else None
    ray.train.report(metrics, checkpoint=given, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def _is_ray_worker() -> bool:
    if "ray.train" not in sys.modules:
        return False
    import ray.train

    try:
        ray.train.get_context()
    except RuntimeError:
        return False
    return True
