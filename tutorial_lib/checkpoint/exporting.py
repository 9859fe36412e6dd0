"""A checkpoint's weights as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch

from tutorial_lib.checkpoint.files import CheckpointError, verify
from tutorial_lib.checkpoint.whole import open_whole
from tutorial_lib.config import ConfigError


def export(path: Path, target: Path) -> Path:
    """Write a checkpoint's weights as a Hugging Face directory that ``from_pretrained`` loads.

    One process, no GPU: the shards of any ZeRO stage, of FSDP2 and of any tensor-parallel size are merged on the CPU.
    Under mixed precision the fp32 master weights are exported, not their 16-bit copies.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: ``target`` already holds something.
    """
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty. Name a new directory for the export.")
    verify(path)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path / "model"), dtype=torch.float32)
    whole = open_whole(path)
    weights = {name: whole.parameter(name) for name in whole.names} | whole.buffers()
    # Tied weights are read under the first of their names only: assign what is there, tie, and see that all is there.
    outcome = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    lost = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if lost or outcome.unexpected_keys:
        raise CheckpointError(
            f"{path} does not fit its own model configuration: missing {lost}, unexpected {outcome.unexpected_keys}."
        )
    model.config.use_cache = True  # off while training; whoever loads the export wants to generate
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(path / "model").save_pretrained(target)
    return target
