"""Stored weights: the files that hold a pretrained model's tensors, and checks that they are complete."""

from __future__ import annotations

import json
import re
import textwrap
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from tutorial_lib.config import ConfigError
from tutorial_lib.models.directory import check_no_pointer

_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names of weight files, in the order in which transformers looks for them."""

_FEW = 3  # number of names shown in a message


def locate_weights(target: str, local_files_only: bool) -> list[Path]:
    """Return the files of a model's weights, downloading them from the hub if needed.

    Args:
        target: hub name or directory, as ``from_pretrained`` takes it.
        local_files_only: do not contact the hub.
    """
    options: dict[str, Any] = {"local_files_only": local_files_only, "_raise_exceptions_for_missing_entries": False}
    for name in _NAMES:
        if found := cached_file(target, name, **options):
            if not name.endswith(".json"):
                return [Path(found)]
            paths = [cached_file(target, shard, **options) for shard in _shards(Path(found))]
            return [Path(path) for path in paths if path]
    return []


def check_files(directory: str) -> None:
    """Refuse a model's directory whose weight files are incomplete. No tensor is read.

    Raises:
        ConfigError: names the file, what is wrong with it, and how to get it.
    """
    read = next((path for name in _NAMES if (path := Path(directory, name)).is_file()), None)
    if read and read.name.endswith(".json"):
        if absent := [shard for shard in _shards(read) if not (read.parent / shard).is_file()]:
            raise ConfigError(f"{read} names files that are not there: {_some(absent)}. Copy or download them again.")
    for path in locate_weights(directory, local_files_only=True):
        check_no_pointer(path)
        if reason := _damage(path):
            raise ConfigError(f"{path} is damaged or cut short ({reason}). Copy or download it again.")


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index} is damaged: it is not a JSON object with a weight_map from tensors to files. Copy or download "
            "it again."
        ) from error


def _damage(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return None
        except SafetensorError as error:
            return str(error)
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    return "its table of contents is missing" if is_zip and not zipfile.is_zipfile(path) else None


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file, by its name in that file."""

    path: str
    name: str
    shape: tuple[int, ...]
    is_integer: bool


def stored_tensors(paths: Iterable[Path]) -> list[StoredTensor]:
    """List the tensors in weight files, without reading their values.

    Raises:
        ConfigError: as for :func:`load_pickled`.
    """
    found = []
    for path in paths:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    is_integer = tensor.get_dtype().startswith(("I", "U", "BOOL"))  # others are F32, BF16, F8_E4M3
                    found.append(StoredTensor(str(path), name, tuple(tensor.get_shape()), is_integer))
        else:
            for name, values in load_pickled(path, "meta").items():
                found.append(StoredTensor(str(path), name, tuple(values.shape), not values.is_floating_point()))
    return found


def check_no_integers(found: Mapping[str, StoredTensor]) -> None:
    """Refuse parameters that are stored as integers: read as plain numbers, quantized weights give a wrong model.

    Raises:
        ConfigError: names the first file and tensor.
    """
    if integers := [tensor for tensor in found.values() if tensor.is_integer]:
        raise ConfigError(
            f"{integers[0].path} stores {integers[0].name} as integers, and config.json has no quantization_config to "
            "say what they stand for. Write the directory of the model before it was quantized."
        )


def check_pickles(target: str, local_files_only: bool) -> None:
    """Refuse weights that cannot be read without running code from their files. See :func:`locate_weights`.

    Raises:
        ConfigError: as for :func:`load_pickled`.
    """
    for path in locate_weights(target, local_files_only):
        if path.suffix != ".safetensors":
            load_pickled(path, "meta")


def load_pickled(path: Path, device: str) -> dict[str, torch.Tensor]:
    """Load a file that ``torch.save`` wrote, without running any code that its pickle may hold.

    Args:
        path: the file, such as ``pytorch_model.bin``.
        device: where to put its tensors; ``meta`` gives only their shapes.

    Raises:
        ConfigError: the file holds more than tensors, or is damaged. The message says how to convert it.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about pickle protocols
            found = torch.load(path, map_location=device, mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # a damaged pickle can make its reader raise almost anything
        raise ConfigError(_load_failure(path, error)) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} holds a {type(found).__name__}, not tensors by parameter name. Write the directory of a model "
            "that was saved with save_pretrained."
        )
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


_WRITTEN_BY_TORCH = (b"PK", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")
"""First bytes of a file from ``torch.save``: a zip archive, or before torch 1.6 a pickled number."""


def _load_failure(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(16)
    code = re.search(r"GLOBAL (\S+)|class (\S+)", str(error)) if "weights only" in str(error).lower() else None
    if not start.startswith((*_WRITTEN_BY_TORCH, b"\x80")) or (not code and start.startswith(_WRITTEN_BY_TORCH)):
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")
        return f"{path} is damaged, or not a weight file ({reason}). Copy or download it again."
    holds = f" ({code[1] or code[2]})" if code else ""
    load = "torch.load(f, map_location='cpu', weights_only=False)"
    if not start.startswith(_WRITTEN_BY_TORCH):
        load = "pickle.load(f)"
    directory = str(path.parent)
    return (
        f"{path} is a pickle of more than tensors{holds}. Reading it could run any code it holds, so it was not "
        "read. Choose a model with safetensors files or, if you trust the author, convert it once:\n"
        "python - <<'END'\n"
        "import pathlib, pickle, torch\n"
        "from safetensors.torch import save_file\n"
        f"directory, tensors = pathlib.Path({directory!r}), {{}}\n"
        f"for path in directory.glob('pytorch_model*.bin'):\n"
        "    with path.open('rb') as f:\n"
        f"        found = {load}\n"
        "    found = found.get('state_dict', found)\n"
        "    tensors |= {name: t.clone() for name, t in found.items() if isinstance(t, torch.Tensor)}\n"
        "save_file(tensors, directory / 'model.safetensors', {'format': 'pt'})\n"
        "END"
    )


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that files and checkpoints hold besides parameters, such as a router's bias, by name.

    Any other buffer is computed from the model's configuration.
    """
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name in buffers}


def match_tensors(
    model: PreTrainedModel, stored: Iterable[StoredTensor]
) -> tuple[dict[str, StoredTensor], list[StoredTensor], list[str]]:
    """Match a model's parameters and persistent buffers with stored tensors, by names that transformers accepts.

    Returns:
        Stored tensors by the model's names; tensors that transformers would convert while loading, such as experts that
        are stored one by one and trained as one tensor; and the names of all other tensors.
    """
    conversions = get_model_conversion_mapping(model)
    renamings: Any = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters: Any = [each for each in conversions if isinstance(each, WeightConverter)]
    own = dict(model.named_parameters(remove_duplicate=False)) | persistent_buffers(model)
    found, converted, others = {}, [], []
    for tensor in stored:
        name, pattern = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, own)
        if pattern is not None:
            converted.append(tensor)
        elif name in own:
            found[name] = tensor
        else:
            others.append(name)
    return found, converted, others


def check_complete(
    name: str, *, missing: Iterable[str], wrong_shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]
) -> None:
    """Refuse pretrained weights that would leave some parameters at their random initial values.

    Args:
        name: name of the model.
        missing: parameters that no file holds.
        wrong_shapes: for tensors stored in the wrong shape, the shape in the file and the shape in the model.

    Raises:
        ConfigError: names the first few of these parameters.
    """
    if wrong_shapes:
        found = [f"{key} as {list(stored)} in place of {list(own)}" for key, (stored, own) in wrong_shapes.items()]
        raise ConfigError(
            f"The files of the model {name!r} do not fit its config.json: they hold {_some(found)}. "
            "Write the directory of a model whose files and config.json belong together."
        )
    if names := sorted(missing, key=_natural):
        raise ConfigError(
            f"The files of the model {name!r} lack {len(names)} of its parameters: {_some(names)}. Training would "
            "start from random numbers there. Choose a model whose files are complete, such as one that "
            "AutoModelForCausalLM loaded and save_pretrained saved."
        )


def check_all_used(name: str, model: PreTrainedModel, others: Iterable[str]) -> None:
    """Refuse files with tensors that loading would silently drop, so that a different model would be trained.

    A tensor is refused if it belongs to a module of the model that has no such parameter: a bias that ``config.json``
    turns off, a layer beyond ``num_hidden_layers``, an adapter of a layer. It is also refused if it belongs to layers
    that the model has none of: an encoder's, or those that read images. Heads for other tasks and old buffers are
    allowed.

    Args:
        name: name of the model.
        model: the model with its parameters, on any device.
        others: names of stored tensors that match none of its parameters and persistent buffers.

    Raises:
        ConfigError: names the first few of these tensors.
    """
    own = [key for key, _ in model.named_parameters(remove_duplicate=False)]
    modules = {key.rpartition(".")[0] for key in own}
    layers = [layer for key in own if (layer := re.match(r"(.*?\.)\d+\.", key))]
    lists, items = {layer[1] for layer in layers}, {layer[0] for layer in layers}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ())]
    buffers = {key for key, _ in model.named_buffers()}

    def belongs_to_model(key: str) -> bool:
        item = re.match(r"(.*?\.)\d+\.", key)
        beyond = item is not None and item[1] in lists and item[0] not in items
        return key.rpartition(".")[0] in modules or beyond or ".lora_" in key or belongs_to_other_layers(key)

    def belongs_to_other_layers(key: str) -> bool:
        item = re.match(r"(.*?\.)\d+\..+\.", key)
        return item is not None and not any(layer.endswith(item[1]) for layer in lists)

    dropped = [
        key
        for key in sorted(set(others) - buffers, key=_natural)
        if belongs_to_model(key) and not any(re.search(pattern, key) for pattern in ignored)
    ]
    if dropped:
        raise ConfigError(
            f"The files of the model {name!r} hold {len(dropped)} tensors that its config.json, read as a causal "
            f"language model's, has no parameter for: {_some(dropped)}. They would be dropped, and a different model "
            "trained. Correct config.json, merge an adapter into the weights, or remove the tensors from the files. To "
            "train only the decoder of a larger model, save it once: "
            "AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW)."
        )


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more
