"""Source documents of the embedded data sets: the text of ``documents.jsonl.gz``, one document per module or topic.

The text is the documentation of CPython 3.11.7, extracted by :mod:`tutorial_lib.embedded.extract`. It is shipped rather
than read from the running Python, so that everybody trains on the same rows: docstrings differ between versions, and
a Jupyter kernel replaces some built-in functions along with their docstrings.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

TEXT = Path(__file__).with_name("documents.jsonl.gz")

SPLITS = ("train", "validation", "test")

_SPLIT_SALT = 1554
"""Chosen so that the four labels of the news have about the same shares in all three splits."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing: a module, class, function or language topic.

    Attributes:
        name: the name in code, such as ``os.path.join``; for a topic, its title.
        kind: ``module``, ``class``, ``function``, ``property`` or ``topic``.
        paragraphs: the prose, one line each; code, tables and grammar are left out.
        opening: whether the first paragraph is the docstring's own first paragraph.
    """

    name: str
    kind: str
    paragraphs: tuple[str, ...]
    opening: bool = True

    @property
    def public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))


@dataclass(frozen=True, slots=True)
class Document:
    """The entries of one module or one language topic."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def split(self) -> str:
        """The split of this document in every corpus: about 10 % validation, 10 % test."""
        bucket = int(text_hash(f"{_SPLIT_SALT}:{self.name}"), 16) % 10
        return {0: "test", 1: "validation"}.get(bucket, "train")


def text_hash(text: str) -> str:
    """Return a stable hexadecimal hash of some text: 24 digits, the length of SQuAD's ids."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@functools.cache
def documents() -> tuple[Document, ...]:
    """Read all source documents, sorted by name. No two of them share a paragraph."""
    read = []
    with gzip.open(TEXT, "rt", encoding="utf-8") as lines:
        for line in lines:
            fields = json.loads(line)
            entries = (Entry(**{**entry, "paragraphs": tuple(entry["paragraphs"])}) for entry in fields["entries"])
            read.append(Document(fields["name"], tuple(entries)))
    return tuple(read)
