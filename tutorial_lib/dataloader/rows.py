"""A data set's name -> its rows: hub name, directory or ``embedded/...`` through ``datasets.load_dataset`` alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import datasets.exceptions

from tutorial_lib.config import ConfigError
from tutorial_lib.embedded import DATASET_NAMES, dataset_directory


def load_rows(name: str, split: str, *, max_examples: int | None = None) -> datasets.Dataset:
    """The rows of one split, memory-mapped from disk.

    Code that a data set ships with is never run: ``datasets`` has not supported that since its version 4.

    Args:
        name: ``embedded/...``; a directory of parquet, jsonl, csv or arrow files, or one that ``save_to_disk`` wrote;
            or a hub name. Where a data set has several configurations, the wanted one follows a colon:
            ``Salesforce/wikitext:wikitext-2-raw-v1``.
        split: a split's name; other than for ``save_to_disk`` directories also a slice, ``train[:90%]``.
        max_examples: use only the first this many rows of the split.

    Raises:
        ConfigError: no such data set or split, no way to reach the hub, files that cannot be read, no rows.
    """
    source, configuration = _source(name)
    try:
        if _is_saved_to_disk(source):
            rows = _saved_split(name, source, split)
        else:
            with _no_retries_without_a_hub(source):
                rows = datasets.load_dataset(source, configuration, split=split, keep_in_memory=False)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_explain(name, split, error)) from error
    if max_examples is not None:
        rows = rows.select(range(min(max_examples, len(rows))))
    return rows


def _source(name: str) -> tuple[str, str | None]:
    """What ``load_dataset`` is given: a directory or a hub name, and the configuration that follows a colon."""
    if name.startswith("embedded/"):
        return str(dataset_directory(name)), None
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser().resolve()), None
    source, _, configuration = name.partition(":")
    if configuration and Path(source).expanduser().is_dir():
        return str(Path(source).expanduser().resolve()), configuration
    return source, configuration or None


def _is_saved_to_disk(source: str) -> bool:
    return any(Path(source, marker).is_file() for marker in ("dataset_dict.json", "state.json"))


def _saved_split(name: str, directory: str, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(directory, keep_in_memory=False)
    if isinstance(saved, datasets.Dataset):
        saved = datasets.DatasetDict({str(saved.split or "train"): saved})
    if split not in saved:
        raise ConfigError(f"Data set {name!r} has no split {split!r}. {_SPLIT_ADVICE}It has: {', '.join(saved)}.")
    return saved[split]


@contextmanager
def _no_retries_without_a_hub(source: str) -> Iterator[None]:
    """Tell ``datasets`` that it is offline where it is, so that a mistyped name fails at once, not after 24 seconds.

    Data sets that are in its cache load either way.
    """
    from tutorial_lib.models.loading import hub_reachable  # loads transformers, which local data does not need

    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not (Path(source).is_dir() or hub_reachable())
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


_SPLIT_ADVICE = (
    "Write train_split / eval_split as one that it has; a slice such as train[90%:] makes one from another. "
)


def _explain(name: str, split: str, error: Exception) -> str:
    """What was wrong with the request, and what to write instead, for each way in which ``datasets`` fails."""
    text = " ".join(str(error).split())
    embedded = f"a directory with parquet, jsonl, csv or arrow files, or one of {', '.join(DATASET_NAMES)}"
    if isinstance(error, ConnectionError):
        return (
            f"Data set {name!r} is no directory here, and the hub cannot be reached to look for it there. "
            f"Without a hub write {embedded}. ({text})"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"The hub does not have the data set {name!r}, or does not show it to you. Write {embedded}. ({text})"
    if isinstance(error, FileNotFoundError):
        return f"Data set {name!r} has no data files that can be read. Write {embedded}. ({text})"
    if "Unknown split" in text:
        return f"Data set {name!r} has no split {split!r}. {_SPLIT_ADVICE}({text})"
    if "corresponds to no data" in text:
        return f"Split {split!r} of data set {name!r} has no rows. Write a split, or a slice of one, that has some."
    if "onfig name is missing" in text or re.search(r"BuilderConfig .* not found", text):
        return f"Write which configuration of {name!r} is meant, after a colon: {name.split(':')[0]}:NAME. ({text})"
    if isinstance(error, OSError):
        return (
            f"Data set {name!r} cannot be kept on disk: {error}. "
            "Set HF_HOME to a directory that you can write to and that has space."
        )
    return f"Data set {name!r} cannot be read: {text}"
