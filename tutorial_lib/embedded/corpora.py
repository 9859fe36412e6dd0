"""Embedded data sets: Python's documentation in the schemas of well-known data sets.

| name | schema of | one row |
| --- | --- | --- |
| ``embedded/news`` | ag_news: ``text``, ``label`` | an entry's description, or a paragraph of a topic; the label is the entry's field |
| ``embedded/articles`` | wikitext: ``text`` | some consecutive paragraphs of one module's or topic's documentation |
| ``embedded/qa`` | SQuAD v1.1: ``id``, ``title``, ``context``, ``question``, ``answers`` | a question about one entry, answered by a span of the context |

A document (see :mod:`tutorial_lib.embedded.documents`) is in the same split of all three, so no model pretrained or
fine-tuned on training rows has seen its evaluation rows.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tutorial_lib.embedded.documents import SPLITS, TEXT, Document, Entry, documents, text_hash

Row = dict[str, Any]

NEWS_LABELS = ("Language", "Data", "Network", "System")
"""Fields that modules serve: Python itself, values and formats, communication, or the machine it runs on."""

_FIELDS = {
    "Language": "__future__ _py_abc abc ast bdb builtins cProfile code codeop contextlib copyreg cmd compileall "
    "dataclasses dis doctest enum functools imp importlib inspect keyword linecache modulefinder opcode operator "
    "pdb pkgutil profile pstats py_compile pyclbr pydoc rlcompleter runpy symtable tabnanny timeit token "
    "tokenize trace traceback tracemalloc types typing unittest warnings weakref zipimport",
    "Data": "aifc base64 binascii bisect bz2 calendar chunk codecs collections colorsys configparser copy csv "
    "datetime dbm decimal difflib fractions getopt gettext graphlib gzip hashlib heapq hmac html imghdr int "
    "json locale lzma numbers optparse argparse pickle pickletools plistlib pprint quopri random re reprlib "
    "secrets shelve sndhdr sqlite3 sre_compile sre_constants sre_parse statistics string stringprep struct sunau "
    "tarfile textwrap time tomllib uu uuid wave xdrlib xml zipfile zoneinfo",
    "Network": "asynchat asyncore asyncio cgi cgitb email ftplib http imaplib ipaddress mailbox mailcap mimetypes "
    "netrc nntplib poplib selectors smtpd smtplib socket socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc",
    "System": "concurrent crypt ctypes curses filecmp fileinput fnmatch getpass glob io logging multiprocessing "
    "ntpath nturl2path os pathlib pipes platform pty queue sched shlex shutil signal site stat subprocess sysconfig "
    "tempfile threading tty zipapp",
}
_FIELD_OF = {module: field for field, modules in _FIELDS.items() for module in modules.split()}

_NEWS_CHARACTERS = (60, 600)
_ARTICLE_CHARACTERS = 1200
_CONTEXT_CHARACTERS = 500
_SHORTEST_CONTEXT = 150


def content_hash() -> str:
    """Return a hash of all that the parquet files depend on: the text, the code, and the packages that write them."""
    files = (TEXT, TEXT.with_name("documents.py"), TEXT.with_name("corpora.py"))
    content = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    for package in ("datasets", "pyarrow"):
        content.update(f"{package} {version(package)}".encode())
    return content.hexdigest()[:16]


def write_corpus(name: str, directory: Path) -> None:
    """Write one embedded data set as ``train.parquet``, ``validation.parquet`` and ``test.parquet``.

    The features (such as the names of the labels) are part of the files: ``datasets.load_dataset(str(directory))``
    needs nothing else.
    """
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Features, Sequence, Value

    features = {
        "embedded/news": Features(text=Value("string"), label=ClassLabel(names=list(NEWS_LABELS))),
        "embedded/articles": Features(text=Value("string")),
        "embedded/qa": Features(
            id=Value("string"), title=Value("string"), context=Value("string"), question=Value("string"),
            answers={"text": Sequence(Value("string")), "answer_start": Sequence(Value("int32"))},
        ),
    }[name]  # fmt: skip
    for split in SPLITS:
        table = pyarrow.Table.from_pylist(rows(name, split), schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, directory / f"{split}.parquet")


def rows(name: str, split: str) -> list[Row]:
    """Return the rows of one split, in an order that only depends on the text."""
    builder: Callable[[Document], Iterator[Row]] = {
        "embedded/news": _news, "embedded/articles": _articles, "embedded/qa": _questions,
    }[name]  # fmt: skip
    chosen = [document for document in documents() if document.split == split]
    if name == "embedded/articles":
        # Documents are mixed, but an article keeps its paragraphs in order.
        chosen.sort(key=lambda document: text_hash(document.name))
        return [row for document in chosen for row in builder(document)]
    found = [row for document in chosen for row in builder(document)]
    # A short run only uses the first rows of a split, so these must not all come from the same module.
    return sorted(found, key=lambda row: text_hash("".join(str(value) for value in row.values())))


def _articles(document: Document) -> Iterator[Row]:
    text = f" = {_title(document)} = \n"
    for entry in document.entries:
        lead = "" if entry.kind == "topic" else f"{entry.name}: "
        for paragraph in entry.paragraphs:
            if len(text) + len(paragraph) > _ARTICLE_CHARACTERS and text.count("\n") > 1:
                yield {"text": text}
                text = ""
            text += f" {lead}{paragraph} \n"
            lead = ""
    yield {"text": text}


def _title(document: Document) -> str:
    return document.entries[0].name if document.name.startswith("topic ") else document.name


def _news(document: Document) -> Iterator[Row]:
    topic = document.name.startswith("topic ")
    field = "Language" if topic else _FIELD_OF.get(document.name.partition(".")[0])
    if field is None:
        return
    for entry in document.entries:
        if not topic and not (entry.public and entry.opening):
            continue
        # A topic is long, so each of its paragraphs is a separate piece of news. A docstring is a single piece.
        for story in entry.paragraphs if topic else (" ".join(entry.paragraphs[:3]),):
            text = f"{entry.name} - {story}"
            text = _shortened(text, _NEWS_CHARACTERS[1])
            if len(text) >= _NEWS_CHARACTERS[0]:
                yield {"text": text, "label": NEWS_LABELS.index(field)}


def _shortened(text: str, longest: int) -> str:
    """Cut a text to complete sentences up to a length, or to complete words if the first sentence is longer."""
    if len(text) <= longest:
        return text
    ends = [found.start() for found in re.finditer(r"(?<=[.!?]) ", text[:longest])]
    return text[: ends[-1]] if ends else text[:longest].rpartition(" ")[0]


def _questions(document: Document) -> Iterator[Row]:
    if document.name.startswith("topic "):
        return
    usable = [entry for entry in document.entries if entry.public and entry.opening]
    asked: set[str] = set()
    for number, entry in enumerate(usable):
        for question, paragraph, answer in _asked_about(entry):
            if question in asked:
                continue
            asked.add(question)
            context, start = _context(usable, number, paragraph, answer, question)
            if len(context) < _SHORTEST_CONTEXT:
                continue
            yield {
                "id": text_hash(f"{question}\n{context}"),
                "title": document.name,
                "context": context,
                "question": question,
                "answers": {"text": [answer], "answer_start": [start]},
            }


def _asked_about(entry: Entry) -> Iterator[tuple[str, int, str]]:
    """Yield questions that an entry answers: the question, the number of the answer's paragraph, and the answer."""
    first = _SENTENCE.match(entry.paragraphs[0])
    if first and len(first[1].split()) >= 3:
        sentence = first[1]
        returned = re.match(r"Returns? (.+)", sentence)
        if entry.kind == "module":
            yield f"What is the module {entry.name} about?", 0, sentence
        elif entry.kind in ("class", "property"):
            yield f"What is {entry.name}?", 0, returned[1] if returned else sentence
        elif returned and len(returned[1].split()) >= 2:
            yield f"What does {entry.name} return?", 0, returned[1]
        elif re.match(r"[A-Z][a-z]+ ", sentence) and sentence.split()[0] not in _NO_VERBS:
            yield f"What does {entry.name} do?", 0, sentence
    if entry.kind == "function":
        for number, paragraph in enumerate(entry.paragraphs):
            for raised in _RAISES.finditer(paragraph):
                yield f"When does {entry.name} raise {raised[1]}?", number, raised[2]


_NO_VERBS = frozenset(
    "A All An As Called Do For From Given Helper How If In Internal Is Like Not Optional Same See Similar The This "
    "True Used What When Whether Which With".split()
)
_SENTENCE = re.compile(r"([A-Z].{10,230}?)(?:(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s|$)|:$|$)")
_RAISES = re.compile(
    r"\b[Rr]aises? (?:an? )?([A-Z]\w+(?:Error|Exception|Interrupt)) ((?:if|when|unless) [^.;]{8,120})\."
)


def _context(usable: list[Entry], number: int, paragraph: int, answer: str, salt: str) -> tuple[str, int]:
    """Return the entry's text together with its neighbours', and the answer's start within it."""
    entry = usable[number]
    lead = f"{entry.name}: "
    own = lead + " ".join(entry.paragraphs)
    start = own.index(answer, len(lead + " ".join(entry.paragraphs[:paragraph])))
    if start > _CONTEXT_CHARACTERS:
        own = lead + entry.paragraphs[paragraph]
        start = own.index(answer, len(lead))
    own = _shortened(own, max(2 * _CONTEXT_CHARACTERS, start + len(answer) + 2))
    before, after = number - 1, number + 1
    in_front = int(text_hash(salt), 16) % 2 == 0
    context = own
    while len(context) < _CONTEXT_CHARACTERS and (before >= 0 or after < len(usable)):
        if (in_front and before >= 0) or after >= len(usable):
            piece = _shortened(_story(usable[before]), _CONTEXT_CHARACTERS) + " "
            context, start, before = piece + context, start + len(piece), before - 1
        else:
            context, after = f"{context} {_shortened(_story(usable[after]), _CONTEXT_CHARACTERS)}", after + 1
        in_front = not in_front
    return context, start


def _story(entry: Entry) -> str:
    return f"{entry.name}: {' '.join(entry.paragraphs)}"
