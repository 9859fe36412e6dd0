"""CPython's own documentation as source documents: one per standard-library module and one per language topic.

Docstrings are read by parsing the sources, so nothing is imported and nothing runs; ``builtins``, which every
interpreter has loaded, is the one module without a source file that is read too. Packages that distributions leave
out (tkinter, idlelib, tests, ...) are skipped, so that interpreters of one version give the same text.

A paragraph that occurs in several documents (an inherited docstring, a section repeated in a longer topic) stays only
in the first one: documents share no paragraph, and splits made of whole documents share no text.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

CORPUS_VERSION = 2
"""To be raised with every change to what the corpora hold: it is part of the cache's path."""

SPLITS = ("train", "validation", "test")

_SPLIT_SALT = 1554
"""Chosen so that the three splits hold the four labels of the news in about the same shares."""

_SKIPPED = {
    "antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages",
    "sitecustomize", "test", "tests", "this", "tkinter", "turtle", "turtledemo", "usercustomize", "venv",
}  # fmt: skip

_PUBLIC_NAMES = {
    "_collections_abc": "collections.abc", "_pydatetime": "datetime", "_pydecimal": "decimal", "_pyio": "io",
    "_pylong": "int", "_strptime": "time", "_threading_local": "threading.local", "_weakrefset": "weakref",
    "genericpath": "os.path", "posixpath": "os.path",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing: a module, class, function or language topic.

    Attributes:
        name: what a programmer writes, such as ``os.path.join``; for a topic, its title.
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
    """What one source says: a module's file, or a language topic."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def split(self) -> str:
        """The split this document belongs to, in every corpus: about 10 % validation, 10 % test."""
        bucket = int(digest(f"{_SPLIT_SALT}:{self.name}"), 16) % 10
        return {0: "test", 1: "validation"}.get(bucket, "train")


def digest(text: str) -> str:
    """A stable hexadecimal hash of some text: 24 digits, the length of SQuAD's ids."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def fingerprint() -> str:
    """Names the text that this interpreter gives: its version, its build, and the version of these rules."""
    build = digest(sys.version)[:8]
    return f"v{CORPUS_VERSION}-{platform.python_implementation().lower()}-{platform.python_version()}-{build}"


@functools.cache
def documents() -> tuple[Document, ...]:
    """All source documents, sorted by name, sharing no paragraph.

    Raises:
        RuntimeError: the interpreter comes without its sources.
    """
    found = sorted([*_modules(), *_topics()], key=lambda d: (d.name.startswith(("_", "ntpath")), d.name))
    seen: set[str] = set()
    kept = []
    for document in found:
        entries = tuple(e for e in (_without_repeats(e, seen) for e in document.entries) if e.paragraphs)
        if entries:
            kept.append(Document(document.name, entries))
    if len(kept) < 100:
        raise RuntimeError(
            f"Only {len(kept)} documented modules were found in {_stdlib()}: this interpreter comes without the "
            "sources of its standard library, which the embedded data sets are made of. Use a full CPython."
        )
    return tuple(sorted(kept, key=lambda d: d.name))


def _without_repeats(entry: Entry, seen: set[str]) -> Entry:
    kept = []
    for paragraph in entry.paragraphs:
        key = re.sub(r"\W+", " ", paragraph).strip().lower()
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return replace(entry, paragraphs=tuple(kept), opening=entry.opening and kept[:1] == list(entry.paragraphs[:1]))


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules() -> Iterator[Document]:
    merged: dict[str, list[Entry]] = {"builtins": list(_builtins())}
    for path in sorted(_stdlib().rglob("*.py")):
        parts = path.relative_to(_stdlib()).with_suffix("").parts
        # The modules of encodings are generated tables: one sentence, over and over.
        if _SKIPPED.intersection(parts) or parts[0].startswith("_sysconfigdata") or parts[0] == "encodings":
            continue
        dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        name = _PUBLIC_NAMES.get(dotted, dotted)
        try:
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        merged.setdefault(name, []).extend(_entries(tree, name, "module"))
    for name, entries in merged.items():
        yield Document(name, tuple(entries))


def _entries(node: ast.AST, name: str, kind: str) -> Iterator[Entry]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        yield from _entry(name, kind, ast.get_docstring(node))
    for child in getattr(node, "body", []):
        if isinstance(child, ast.ClassDef):
            yield from _entries(child, f"{name}.{child.name}", "class")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            member = "property" if any(_is_property(d) for d in child.decorator_list) else "function"
            yield from _entry(f"{name}.{child.name}", member, ast.get_docstring(child))
        elif isinstance(child, ast.If | ast.Try):
            yield from _entries(child, name, kind)


def _is_property(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Name) and decorator.id.endswith("property")


def _builtins() -> Iterator[Entry]:
    yield from _entry("builtins", "module", builtins.__doc__)
    for name, thing in sorted(vars(builtins).items()):
        if name.startswith("_") or getattr(thing, "__module__", None) != "builtins":
            continue
        yield from _entry(name, "class" if isinstance(thing, type) else "function", thing.__doc__)
        for member, value in sorted(vars(thing).items()) if isinstance(thing, type) else ():
            if inspect.isroutine(value) and not member.startswith("_"):
                yield from _entry(f"{name}.{member}", "function", value.__doc__)


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for key, text in sorted(topics.items()):
        title = text.strip().partition("\n")[0].replace('"', "")
        yield Document(f"topic {key}", tuple(_entry(title, "topic", text)))


def _entry(name: str, kind: str, text: str | None) -> Iterator[Entry]:
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(text or ""))
    prose = [(number, " ".join(block.split())) for number, block in enumerate(blocks) if _is_prose(block)]
    if prose:
        yield Entry(name, kind, tuple(paragraph for _, paragraph in prose), opening=prose[0][0] == 0)


def _is_prose(block: str) -> bool:
    """Whether a paragraph is sentences rather than code, a table, a heading or a grammar rule."""
    if re.search(r">>>|::=|->|[=*~^-]{4,}|[{}|]|^\s*\w+\s*=\s|\$", block, re.MULTILINE):
        return False
    letters = sum(c.isalpha() or c == " " for c in block)
    return len(block.split()) >= 4 and letters >= 0.85 * len(block.replace("\n", " "))
