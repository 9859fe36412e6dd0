"""Adaptations to a GPU machine's older packages, which are reported with the figures."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


@cache
def adapt() -> list[str]:
    """Add functions that the library calls to older packages, and return the changes (none with pinned versions)."""
    from torch.distributed.checkpoint.staging import DefaultStager
    from torch.distributed.checkpoint.staging import StateDictStager as Copier
    from transformers import PreTrainedModel

    model: Any = PreTrainedModel
    done = []
    if not hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable = model.gradient_checkpointing_enable
        done.append("transformers: activation_checkpointing_enable is gradient_checkpointing_enable")
    if "_state_dict_stager.close()" in inspect.getsource(DefaultStager._stage):
        Copier.close = lambda self: None  # type: ignore[method-assign]
        done.append("torch: a stager that closes itself after one snapshot stays open")
    return done
