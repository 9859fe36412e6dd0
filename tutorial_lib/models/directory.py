"""Model directories: checks of all files besides the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from tutorial_lib.config import ConfigError
from tutorial_lib.files import is_lfs_pointer

GENERATION_CONFIG = "generation_config.json"

_TOKENIZER_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
_OLDER_VOCABULARIES = ("*.txt", "*.model", "*.tiktoken")
"""Tokenizer files that are read only if there is no ``tokenizer.json``."""


def check_no_pointer(path: Path) -> None:
    """Refuse a file that ``git clone`` left as a git-lfs pointer to the real one.

    Raises:
        ConfigError: names the file, and says how to get the real one.
    """
    if is_lfs_pointer(path):
        raise ConfigError(
            f"{path} is a git-lfs pointer of {path.stat().st_size} bytes, not the file itself. "
            f"Run `git lfs pull` in {path.parent}, or download the file."
        )


def check_config(directory: str) -> None:
    """Refuse a ``config.json`` that is not a JSON object, or names a dtype that PyTorch does not have.

    Raises:
        ConfigError: names the file, what is wrong with it, and what to write.
    """
    path = Path(directory, "config.json")
    for key, value in _dtypes(_read_object(path)):
        if not isinstance(getattr(torch, value, None) if isinstance(value, str) else None, torch.dtype):
            raise ConfigError(
                f'{path}: {key} is {json.dumps(value)}, which is not a PyTorch dtype. Write one, such as "float32" or '
                '"bfloat16", or remove the key: it only describes the files. Training follows the setting precision.'
            )


def check_tokenizer_files(directory: str) -> None:
    """Refuse tokenizer files that are git-lfs pointers, JSON files that do not hold an object, and no files at all.

    Raises:
        ConfigError: names the file, what is wrong with it, and what to do.
    """
    root = Path(directory)
    patterns = (*_TOKENIZER_OBJECTS, "vocab.json", *_OLDER_VOCABULARIES)
    if (root / "config.json").is_file() and not any(any(root.glob(pattern)) for pattern in patterns):
        raise ConfigError(
            f"The directory {directory!r} holds a model without a tokenizer. Copy the tokenizer's files "
            "(tokenizer.json, tokenizer_config.json) there, or save it there with tokenizer.save_pretrained."
        )
    objects = {name: _read_object(root / name) for name in _TOKENIZER_OBJECTS}
    if not objects["tokenizer.json"]:
        _read_object(root / "vocab.json")
    older = () if objects["tokenizer.json"] else _OLDER_VOCABULARIES
    for pattern in (*older, "*.jinja", "additional_chat_templates/*.jinja"):
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                check_no_pointer(path)


def check_generation_config(directory: str) -> None:
    """Refuse a ``generation_config.json`` that transformers would not accept.

    Raises:
        ConfigError: names the file, what is wrong with it, and what to do.
    """
    path = Path(directory, GENERATION_CONFIG)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # loading the model will warn about contradictory settings
    try:
        GenerationConfig.from_dict(_read_object(path))
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is not a valid generation config: {error} Correct it, or remove the file: training does not need "
            "it."
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _without_contradictions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key, value in pairs if len(found) < len(pairs) else ():
        if value != found[key]:
            raise ValueError(f"{key!r} is given twice in one object, and only the last one would count")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no such file.

    Raises:
        ConfigError: the path is a directory, or the file is a git-lfs pointer, not JSON, or not an object.
    """
    if not path.exists():
        return {}
    if not path.is_file():
        raise ConfigError(f"{path} is a directory, but must be a file. Copy or download the model again.")
    check_no_pointer(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_contradictions)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. Copy or download it again.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a JSON {type(found).__name__}, but must hold an object: {{...}}.")
    return found


def _dtypes(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the dtypes in a configuration and its nested parts, with their dotted keys."""
    found = []
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value is not None:
            parts = value if isinstance(value, dict) else {"": value}
            found += [(f"{key}.{part}" if part else key, each) for part, each in parts.items() if each is not None]
        elif key.endswith("_config") and isinstance(value, dict) and key != "quantization_config":
            found += [(f"{key}.{inner}", each) for inner, each in _dtypes(value)]
    return found
