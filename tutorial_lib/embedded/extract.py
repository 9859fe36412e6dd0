"""Extraction of the shipped text, ``documents.jsonl.gz``, from the documentation of CPython 3.11.7.

``python -m tutorial_lib.embedded.extract`` (``make embedded-text``) replaces that file. It refuses to run on any
other version, because the documentation differs. You need it only to change what is extracted.

Docstrings are read by parsing the sources, so nothing is imported and nothing runs, except for ``builtins``, which has
no source file and is inspected instead. There is one document per standard-library module and per language topic. A
paragraph that occurs in several documents (an inherited docstring, a section repeated in a longer topic) stays only in
the first one: documents share no paragraph, so splits made of complete documents share no text.
"""

from __future__ import annotations

import ast
import builtins
import gzip
import inspect
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tutorial_lib.embedded.documents import TEXT, Document, Entry

PYTHON = "3.11.7"

_STDLIB = Path(sysconfig.get_path("stdlib"))

_SKIPPED = {
    "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "this", "tkinter", "turtle", "turtledemo", "venv",
}  # fmt: skip
"""Modules that are missing from some installations, or hold no prose (all encodings repeat the same sentence)."""

_PUBLIC_NAMES = {
    "_collections_abc": "collections.abc", "_pydatetime": "datetime", "_pydecimal": "decimal", "_pyio": "io",
    "_pylong": "int", "_strptime": "time", "_threading_local": "threading.local", "_weakrefset": "weakref",
    "genericpath": "os.path", "posixpath": "os.path",
}  # fmt: skip


def extract_documents() -> list[Document]:
    """Extract all documents from the running interpreter, sorted by name. No two of them share a paragraph."""
    # If two modules share a paragraph, the public one keeps it.
    found = sorted([*_modules(), *_topics()], key=lambda d: (d.name.startswith(("_", "ntpath")), d.name))
    seen: set[str] = set()
    kept = []
    for document in found:
        entries = tuple(e for e in (_without_repeats(e, seen) for e in document.entries) if e.paragraphs)
        if entries:
            kept.append(Document(document.name, entries))
    return sorted(kept, key=lambda d: d.name)


def pack(documents: list[Document]) -> bytes:
    """Pack documents into gzipped JSON lines. The same documents and zlib give the same bytes."""
    lines = (json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents)
    return gzip.compress("".join(lines).encode(), mtime=0)


def _without_repeats(entry: Entry, seen: set[str]) -> Entry:
    kept = []
    for paragraph in entry.paragraphs:
        key = re.sub(r"\W+", " ", paragraph).strip().lower()
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return replace(entry, paragraphs=tuple(kept), opening=entry.opening and kept[:1] == list(entry.paragraphs[:1]))


def _modules() -> Iterator[Document]:
    merged: dict[str, list[Entry]] = {"builtins": list(_builtins())}
    for path in sorted(_STDLIB.rglob("*.py")):
        parts = path.relative_to(_STDLIB).with_suffix("").parts
        if _SKIPPED.intersection(parts) or parts[0].startswith("_sysconfigdata"):
            continue
        dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        name = _PUBLIC_NAMES.get(dotted, dotted)
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            tree = ast.parse(path.read_bytes())
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
    """Return whether a paragraph consists of sentences rather than code, a table, a heading or a grammar rule."""
    if re.search(r">>>|::=|->|[=*~^-]{4,}|[{}|]|^\s*\w+\s*=\s|\$", block, re.MULTILINE):
        return False
    letters = sum(c.isalpha() or c == " " for c in block)
    return len(block.split()) >= 4 and letters >= 0.85 * len(block.replace("\n", " "))


def main() -> None:
    """Replace the shipped text.

    Raises:
        SystemExit: this is a different Python than the one the text comes from.
    """
    if (platform.python_implementation(), platform.python_version()) != ("CPython", PYTHON):
        raise SystemExit(
            f"The embedded text is the documentation of CPython {PYTHON}. This is "
            f"{platform.python_implementation()} {platform.python_version()}, which documents itself differently."
        )
    documents = extract_documents()
    TEXT.write_bytes(pack(documents))
    words = sum(len(p.split()) for d in documents for entry in d.entries for p in entry.paragraphs)
    print(f"{TEXT.name}: {len(documents)} documents, {words:,} words")


if __name__ == "__main__":
    main()
