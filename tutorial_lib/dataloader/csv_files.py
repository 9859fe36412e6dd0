"""Malformed CSV files that pandas misreads: rows of different lengths, unusual separators, unclosed quotes."""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOT_A_VALUE = (
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
)  # fmt: skip
"""Strings that pandas reads as missing values, which is right in a column of numbers, but not in a text column."""

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def looks_misread(columns: list[str]) -> bool:
    """Return whether these columns look like a CSV file that pandas misread without an error.

    If rows have more fields than the first line, pandas takes the first fields as an index. It reads a line with
    different separators as a single name, and renames the second of two columns with the same name.
    """
    as_one_name = len(columns) == 1 and any(separator in columns[0] for separator in _SEPARATORS)
    renamed = any(f"{column}.1" in columns for column in columns)
    return as_one_name or renamed or any(column.startswith("__index_level_") for column in columns)


def csv_problem(path: Path) -> str | None:
    """Return the first problem of a CSV file, with its line and what to write instead, or None."""
    if path.suffix == ".zst":
        return None
    with _long_fields(), _open(path) as file:
        reader = csv.reader(file, delimiter=_delimiter(path), strict=True)
        header: list[str] = []
        line = 1
        try:
            for row in reader:
                problem = None
                if row and not header:
                    header, problem = row, _header_problem(row)
                elif len(row) > len(header):
                    separators = "commas" if _delimiter(path) == "," else "tabs"
                    problem = (
                        f"{len(row)} fields, and the first line names {len(header)}. Put a text that contains "
                        f'{separators} in double quotes: "one, two"'
                    )
                if problem:
                    return f"line {line}: {problem}"
                line = reader.line_num + 1
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                return f'line {line}: a double quote is opened and never closed. Write a quote within a text twice: ""'
            if reader.line_num > line:
                return (
                    f"line {line}: a double quote at the start of a field is closed only in line {reader.line_num}, in "
                    'the middle of a text, so these lines would be one field. Write "..." around a text that starts '
                    'with a quote, and each quote within it twice: """Hi"", she said"'
                )
            # Python's reader rejects some files that pandas accepts, such as those with quotes in mid-field.
            return None
        except UnicodeDecodeError:
            return None
    return None if header else "line 1: it is blank, but must name the columns"


def column_names(path: Path) -> list[str]:
    """Return the names in a CSV file's first line that is not blank; none if the file cannot be read."""
    if path.suffix == ".zst":
        return []
    try:
        with _long_fields(), _open(path) as file:
            return next(filter(None, csv.reader(file, delimiter=_delimiter(path))), [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error):
        return []


def damaged_archive(path: Path) -> str | None:
    """Return why a compressed file cannot be read to its end, or None."""
    if path.suffix not in _OPENERS:
        return None
    try:
        with unpacked(path) as file:
            while file.read(2**20):
                pass
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        return f"{str(error).rstrip('.')}. It is damaged, or not compressed"
    return None


def unpacked(path: Path) -> Any:
    """Open a file to read its bytes, decompressed if its name ends in .gz, .bz2 or .xz."""
    return _OPENERS.get(path.suffix, open)(path, "rb")


def _delimiter(path: Path) -> str:
    return "\t" if ".tsv" in path.name.lower() else ","


def _open(path: Path) -> Any:
    return _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="")


def _header_problem(header: list[str]) -> str | None:
    if twice := [name for name in header if header.count(name) > 1]:
        return f"the column {twice[0]!r} is named twice. Rename or remove one of them"
    for separator, name in _SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            return (
                f"its fields are separated by {name}. Write it with commas: "
                f"pandas.read_csv(FILE, sep={separator!r}).to_csv(FILE, index=False)"
            )
    return None


@contextmanager
def _long_fields() -> Iterator[None]:
    """Make Python's CSV reader accept fields of any length."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
