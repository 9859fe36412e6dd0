"""Export of a checkpoint's weights to a Hugging Face directory, one parameter at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checkpoint.formats import FullTensors, open_full
from tutorial_lib.checkpoint.manifest import CheckpointError, sync
from tutorial_lib.config import ConfigError
from tutorial_lib.models.side_files import GENERATION_CONFIG

MAX_SHARD_SIZE = "50GB"
"""Largest weight file, as in transformers' ``save_pretrained``."""

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
           torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
           torch.bool: "BOOL"}  # fmt: skip
"""Names of PyTorch's dtypes in safetensors files."""


def export(path: Path, target: Path, max_shard_size: str = MAX_SHARD_SIZE) -> Path:
    """Write a checkpoint's weights as a Hugging Face directory that ``from_pretrained`` loads.

    One process does this without a GPU: the CPU merges shards of any ZeRO stage or FSDP2, at any tensor-parallel size.
    With mixed precision, the fp32 master weights are exported, not their 16-bit copies. For a model of any size, the
    process holds only about twice the largest parameter at a time: its pieces and the merged result. The directory
    gets its final name once everything in it is on disk.

    Args:
        path: the checkpoint.
        target: a new directory.
        max_shard_size: largest weight file, such as ``"5GB"``; a larger parameter gets a file of its own.

    Raises:
        CheckpointError: the checkpoint is damaged, or ``target`` cannot be written.
        ConfigError: ``target`` is not empty or cannot be replaced, or the size cannot be parsed or is not above 0.
    """
    target = target.expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "is not empty" if target.is_dir() else "is a file"
        raise ConfigError(f"{target} {what}. Name a new directory for the export.")
    final = target.resolve()
    if final == Path.cwd() or final.is_mount():
        what = "a mount point" if final.is_mount() else "the current directory"
        raise ConfigError(
            f"{target} is {what}, which an export cannot replace. Name a new directory in it, such as "
            f"{target / 'exported'}."
        )
    full = open_full(path)
    buffers = full.buffers()
    outlines = {name: torch.empty(full.shapes[name], device="meta") for name in full.names}
    outlines |= {name: buffer.to("meta") for name, buffer in buffers.items()}
    split = _split(outlines, max_shard_size)
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left over from an export that was killed
    try:
        partial.mkdir(parents=True)
        for file, names in split.filename_to_tensors.items():
            _write_safetensors(partial / file, {name: outlines[name] for name in names}, _read(full, buffers, names))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2) + "\n"
            (partial / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        _write_description(path / "model", partial)
        for written in [*partial.rglob("*"), partial]:
            sync(written)
        os.replace(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"The export to {target} failed: {error}. Nothing of it is left, and the checkpoint is unchanged. If the "
            "disk is full or cannot be written to, name a directory on another one."
        ) from error
    sync(final.parent)
    return target


def _split(outlines: dict[str, Tensor], max_shard_size: str) -> Any:
    """Distribute the tensors over files as ``save_pretrained`` does."""
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = "model{suffix}.safetensors"
    try:
        if float(max_shard_size.strip()[:-2]) <= 0:  # the last two characters are the unit
            raise ValueError("not above 0")
        return split_torch_state_dict_into_shards(outlines, filename_pattern=pattern, max_shard_size=max_shard_size)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"max_shard_size={max_shard_size!r} is not a size above 0: write one such as '5GB'."
        ) from error


def _read(full: FullTensors, buffers: dict[str, Tensor], names: list[str]) -> Iterator[Tensor]:
    for name in names:
        yield buffers[name] if name in buffers else full.parameter(name)


def _write_safetensors(path: Path, outlines: dict[str, Tensor], tensors: Iterator[Tensor]) -> None:
    """Write a safetensors file one tensor at a time; ``safetensors.torch.save_file`` needs all of them in memory.

    The format is the header's length in 8 bytes, the header (JSON), and the tensors' bytes one after another.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, outline in outlines.items():
        begin, end = end, end + outline.numel() * outline.element_size()
        header[name] = {
            "dtype": _DTYPES[outline.dtype], "shape": list(outline.shape), "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_description(model: Path, target: Path) -> None:
    """Write the configuration of the exported weights, and copy the tokenizer and the model's other files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(model, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    config = AutoConfig.from_pretrained(model)
    config.dtype = "float32"
    with torch.device("meta"):
        meta_model = AutoModelForCausalLM.from_config(config)
    meta_model.config.architectures = [type(meta_model).__name__]
    meta_model.config.save_pretrained(target)
    if meta_model.can_generate() and not (target / GENERATION_CONFIG).exists():
        meta_model.generation_config.save_pretrained(target)
