"""Embedded data sets and models, the defaults of a run: real English text and small models, without a download.

The models are files of this package, and so is the text: the documentation of CPython 3.11.7, the same on every
machine. On first use, a data set is converted to its schema and saved as parquet in a cache directory, where
``datasets.load_dataset`` reads it like any other data set directory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from tutorial_lib.config import ConfigError

MODEL_NAMES = ("embedded/gpt2", "embedded/qwen2", "embedded/bloom")
"""Pretrained models of this package."""

CONFIG_ONLY_NAMES = ("embedded/gpt2-small",)
"""Configurations and tokenizers without weights, for random weights only."""

DATASET_NAMES = ("embedded/news", "embedded/articles", "embedded/qa")
"""Data sets of this package."""

_HERE = Path(__file__).parent


def cache_directory() -> Path:
    """Return the directory for built data sets: ``$TUTORIAL_LIB_CACHE``, or ``~/.cache/tutorial_lib``."""
    chosen = os.environ.get("TUTORIAL_LIB_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "tutorial_lib"


def model_directory(name: str) -> Path:
    """Return the directory of an embedded model.

    Args:
        name: one of ``MODEL_NAMES`` or ``CONFIG_ONLY_NAMES``.

    Raises:
        ConfigError: there is no embedded model of this name.
    """
    if name not in MODEL_NAMES + CONFIG_ONLY_NAMES:
        raise ConfigError(f"There is no embedded model {name!r}. Write one of: {', '.join(MODEL_NAMES)}.")
    return _HERE / name.removeprefix("embedded/")


def dataset_directory(name: str) -> Path:
    """Return the directory of an embedded data set: ``train``, ``validation`` and ``test`` as parquet.

    It is built on first use. Any number of processes may ask at once: one builds it, under a file lock, and the
    finished directory appears in one rename. The path contains a hash of the sources, so that outdated versions are
    never found.

    Args:
        name: one of ``DATASET_NAMES``.

    Raises:
        ConfigError: there is no embedded data set of this name, or the cache directory cannot be written to.
    """
    if name not in DATASET_NAMES:
        raise ConfigError(f"There is no embedded data set {name!r}. Write one of: {', '.join(DATASET_NAMES)}.")
    from tutorial_lib.embedded.corpora import content_hash

    root = cache_directory() / f"corpora-{content_hash()}"
    target = root / name.removeprefix("embedded/")
    if not target.is_dir():
        _build(name, target)
    return target


def _build(name: str, target: Path) -> None:
    from filelock import FileLock

    from tutorial_lib.embedded.corpora import write_corpus

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock", fallback_to_soft=False):
            if target.is_dir():
                return
            scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
            try:
                write_corpus(name, scratch)
                # mkdtemp makes a private directory; the cache may be shared between users.
                scratch.chmod(0o755)
                scratch.replace(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"{name} could not be written to {target.parent}: {error}. "
            "Set TUTORIAL_LIB_CACHE to a directory that can be written to, on a file system with file locks (flock)."
        ) from error
