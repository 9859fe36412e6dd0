"""Profiles: the values that differ between a laptop, a machine with a GPU, and a cluster."""

from __future__ import annotations

from typing import Any

PROFILE_VALUES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {
        "device": "cuda",
        "precision": "bf16",
        "dp": 1,
        "seq_length": 512,
        "pin_memory": True,
        "bucket_size": 500_000_000,
    },
    "cluster": {
        "device": "cuda",
        "precision": "bf16",
        "dp": 8,
        "seq_length": 512,
        "global_batch": 64,
        "pin_memory": True,
        "bucket_size": 500_000_000,
        "launcher": "none",
        "persistence_threshold": 100_000,
        "checkpoint_every": 100,
    },
}
