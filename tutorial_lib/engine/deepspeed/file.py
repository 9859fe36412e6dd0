"""Users' DeepSpeed JSON files: read, and checked key by key and value by value before any engine starts.

DeepSpeed ignores unknown top-level keys, reads ``"false"`` as true in places where it relies on Python's truth value,
and lets some keys pick a different optimizer or layout of checkpoint files. Here each of these is an error that names
the file, the key and what to write. A key that is missing or ``"auto"`` means the run's own setting or, if the run has
none, DeepSpeed's default.

This module does not import DeepSpeed.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutorial_lib.config import ConfigError
from tutorial_lib.engine.deepspeed.keys import (
    ABOVE_0,
    AT_MOST_1,
    CHOICES,
    LISTS_OF_STRINGS,
    OFFLOADS,
    ON_NVME,
    ONLY_VALUE,
    RENAMED,
    SECTION_KEYS,
    TOP_LEVEL_KEYS,
)

DIRECTORY = Path(__file__).parents[2] / "ds_configs"


def read(name: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file, by path or by its name in ``tutorial_lib/ds_configs``, and check it.

    Returns:
        Its settings: without ``"auto"`` values, under current key names, and with numbers such as 5e8 as ``int`` where
        DeepSpeed expects an integer.

    Raises:
        ConfigError: there is no such file, it is not a valid JSON object, or it has unknown or misplaced keys or
            impossible values.
    """
    return check(read_json(name), source=name)


def read_json(name: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file unchanged, by path or by its name in ``tutorial_lib/ds_configs``.

    Raises:
        ConfigError: there is no such file, or it is not a valid JSON object.
    """
    shipped = DIRECTORY / f"{name.removesuffix('.json')}.json"
    path = Path(name) if Path(name).is_file() else shipped
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in DIRECTORY.glob("*.json")))
        raise ConfigError(f"There is no DeepSpeed file {name!r}. Write a path, or one of: {names}.")

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ConfigError(f"{name}: {twice[0]!r} is given twice in one object. Write it once.")
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8-sig")
        given = json.loads(text, object_pairs_hook=without_duplicates)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8: {error}. Write the file again in UTF-8.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid JSON: {_additions_to_json(text) or error}.") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{name} holds a JSON {type(given).__name__}; DeepSpeed needs an object.")
    return given


_ADDITIONS = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\])*")|(?P<comment>//[^\n]*|#[^\n]*|/\*.*?\*/)"""
    r"""|,(?=(?:\s|//[^\n]*|#[^\n]*|/\*.*?\*/)*(?P<end>[}\]]))""",
    re.DOTALL,
)


def _additions_to_json(text: str) -> str:
    """Return where a text has comments or trailing commas, which JSON does not allow, and what to do about them."""
    problems = []
    for found in _ADDITIONS.finditer(text):
        line = f"line {1 + text.count(chr(10), 0, found.start())}"
        if comment := found["comment"]:
            problems.append(f"{line} has a comment, {comment.splitlines()[0][:40]!r}: JSON has no comments, remove it")
        elif end := found["end"]:
            problems.append(f"{line} has a comma before {end!r}: remove it")
    return "; ".join(problems)


def check(given: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Refuse keys that DeepSpeed would ignore or reject, and values that it would misread.

    Returns:
        The file's settings, as :func:`read` describes them.

    Raises:
        ConfigError: names each wrong key, and what to write instead.
    """
    problems: list[str] = []
    stated = _section(_with_current_names(given, problems), "", problems)
    problems += [
        f"{key} is {json.dumps(value)}: {why}. Write {json.dumps(only)}, or leave it out"
        for key, (only, why) in ONLY_VALUE.items()
        if (value := find(stated, key, only)) != only
    ]
    if find(stated, "bf16.enabled", False) and find(stated, "fp16.enabled", False):
        problems.append("bf16.enabled and fp16.enabled are both true; set one of them to false")
    problems += [
        f"{key} is {json.dumps(value)}; write one of: {', '.join(words)}"
        for key, words in CHOICES.items()
        if isinstance(value := find(stated, key), str) and value.lower() not in map(str.lower, words)
    ]
    problems += [f"{key} is 0; write a number above 0" for key in ABOVE_0 if find(stated, key) == 0]
    problems += [
        f"{key} is {value}; write a number up to 1"
        for key in AT_MOST_1
        if isinstance(value := find(stated, key), int | float) and value > 1
    ]
    problems += [
        f"{key} is {json.dumps(value)}; write a list of strings"
        for key in LISTS_OF_STRINGS
        if isinstance(value := find(stated, key), list) and not all(isinstance(each, str) for each in value)
    ]
    problems += _ineffective_settings(stated)
    if problems:
        told = "; ".join(f"{source}: {problem}" for problem in problems)
        raise ConfigError(told if told.endswith("?") else f"{told}.")
    return stated


def find(given: dict[str, Any], key: str, otherwise: Any = None) -> Any:
    """Return the value under a dotted key, or ``otherwise`` if the key is missing."""
    inside: Any = given
    for part in key.split("."):
        if not isinstance(inside, dict) or part not in inside:
            return otherwise
        inside = inside[part]
    return inside


def _with_current_names(given: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    zero = given.get("zero_optimization")
    given = {**given, "zero_optimization": dict(zero)} if isinstance(zero, dict) else dict(given)
    for old, new in RENAMED.items():
        section, _, old_key = old.rpartition(".")
        inside, new_key = given.get(section) if section else given, new.rpartition(".")[2]
        if isinstance(inside, dict) and old_key in inside:
            value = inside.pop(old_key)
            if inside.setdefault(new_key, value) != value:
                problems.append(f"{old} and {new} are the same key and have different values; remove {old}")
    zero = given.get("zero_optimization")
    if not isinstance(zero, dict):
        return given
    if zero.pop("cpu_offload_use_pin_memory", None) is not None:
        problems.append(
            "zero_optimization.cpu_offload_use_pin_memory no longer has an effect in DeepSpeed; write "
            "zero_optimization.offload_optimizer.pin_memory"
        )
    for old, new in OFFLOADS.items():
        value = _value(zero.pop(old, None), "bool?", f"zero_optimization.{old}", problems)
        if value is not None and new in zero:
            problems.append(f"zero_optimization.{old} is the old name of {new}, which is also there; remove {old}")
        elif value is not None:
            zero[new] = {"device": "cpu" if value else "none"}
    return given


def _section(given: dict[str, Any], section: str, problems: list[str]) -> dict[str, Any]:
    """Return the settings in a section, and add its problems to ``problems``."""
    kinds = SECTION_KEYS.get(section) if section else TOP_LEVEL_KEYS
    stated = {}
    for key, value in given.items():
        where = f"{section}.{key}" if section else key
        if kinds is not None and key not in kinds:
            problems.append(_advice(key, section, kinds))
        elif value != "auto":
            kind = kinds[key] if kinds else "bool" if key == "enabled" else "any"
            stated[key] = _value(value, kind, where, problems)
            if isinstance(value, dict):
                stated[key] = _section(value, where, problems)
    return stated


_WORDS = {"int": "a whole number, at least 0", "float": "a number, at least 0", "bool": "true or false",
          "str": "a string", "list": "a list", "section": "an object"}  # fmt: skip
_TYPES: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "list": list, "section": dict}


def _value(value: Any, kind: str, where: str, problems: list[str]) -> Any:
    """Return a value, as ``int`` where an integer is expected; add to ``problems`` if it is of another kind."""
    nullable, kind = kind.endswith("?"), kind.rstrip("?")
    if kind == "any" or (value is None and nullable):
        return value
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    is_bool = isinstance(value, bool) and kind != "bool"
    is_possible = not isinstance(value, int | float) or 0 <= value < math.inf
    if isinstance(value, _TYPES[kind]) and not is_bool and is_possible:
        return value
    problems.append(f"{where} is {json.dumps(value)}; write {_WORDS[kind]}{_without_quotes(value, kind)}")
    return value


def _without_quotes(value: Any, kind: str) -> str:
    readers: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": {"true": True, "false": False}.get}
    try:
        found = readers[kind](value.strip().lower()) if isinstance(value, str) else None
    except (KeyError, ValueError):
        return ""
    return "" if found is None else f", without quotes: {json.dumps(found)}"


def _ineffective_settings(stated: dict[str, Any]) -> list[str]:
    """Return a problem for each setting that would have no effect in this package."""
    problems = []
    section = stated.get("activation_checkpointing")
    if isinstance(section, dict) and any(section.values()):
        problems.append(
            "activation_checkpointing is for models that call DeepSpeed's own function, and no model here does; write "
            "the setting activation_checkpointing=True and remove the section"
        )
    compiling = stated.get("compile")
    if isinstance(compiling, dict):
        problems += [
            f"compile.{key} needs a compiled model, and no model here is compiled; remove it"
            for key, value in compiling.items()
            if value
        ]
    if "aio" in stated:
        problems.append("aio is for offload to NVMe disks, which this package does not do; remove it")
    problems += [
        f"zero_optimization.{section}.{key} is for offload to NVMe disks, which this package does not do; remove it"
        for section in ("offload_optimizer", "offload_param")
        for key in ON_NVME
        if find(stated, f"zero_optimization.{section}.device") != "nvme"  # which is refused as a device
        and find(stated, f"zero_optimization.{section}.{key}")
    ]
    return problems


def _advice(key: str, section: str, keys: dict[str, str]) -> str:
    if key == "scheduler" and not section:
        return "'scheduler' is not read from the file: use the settings schedule and warmup_steps"
    place = f"in {section}" if section else "at the top level"
    homes = [name for name, known in SECTION_KEYS.items() if key in known and name != section]
    if section and key in TOP_LEVEL_KEYS:
        return f"{key!r} has no meaning {place}; it belongs at the top level"
    if homes and section != "optimizer.params":
        return (
            f"{key!r} has no meaning {place}, where DeepSpeed would ignore or refuse it; it belongs under {homes[0]!r}"
        )
    if key == "max_grad_norm":
        return f"{key!r} has no meaning {place}; write gradient_clipping at the top level"
    if section == "optimizer.params":
        return f"{key!r} in {section} would be ignored: AdamW reads {', '.join(keys)}; remove it"
    near = difflib.get_close_matches(key, keys, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key!r} is not a key that DeepSpeed knows {place}{hint}"
