"""Rows of a data set by name: a hub name, directory, file or ``embedded/...``, all loaded through ``datasets``."""

from __future__ import annotations

import codecs
import glob
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import datasets.exceptions
import pyarrow as pa
import pyarrow.compute as pc

from tutorial_lib.config import ConfigError
from tutorial_lib.dataloader.csv_files import (
    NOT_A_VALUE,
    column_names,
    csv_problem,
    damaged_archive,
    looks_misread,
    unpacked,
)
from tutorial_lib.embedded import DATASET_NAMES, dataset_directory
from tutorial_lib.files import is_lfs_pointer


def load_rows(name: str, split: str, *, max_examples: int | None = None) -> datasets.Dataset:
    """Load the rows of one split, memory-mapped from disk. Their ``info.splits`` tells how long all splits are.

    Code that a data set ships with is never run: ``datasets`` has not supported that since version 4.

    Args:
        name: ``embedded/...``; a directory of parquet, jsonl, csv or arrow files, or one that ``save_to_disk`` wrote; a
            single such file, or a txt file with a row per line, which becomes the training split; or a hub name. If a
            data set has several configurations, name one after a colon: ``Salesforce/wikitext:wikitext-2-raw-v1``.
        split: name of a split, or a slice of one such as ``train[:90%]``.
        max_examples: use only the first rows of the split, at most this many.

    Raises:
        ConfigError: there is no such data set or split, the hub cannot be reached, files cannot be read, or there are
            no rows.
    """
    source, configuration = _source(name)
    try:
        if file := _data_file(name):
            rows = _rows_of_file(file, split)
        elif _is_saved_to_disk(source):
            rows = _saved_split(name, source, split)
        else:
            _check_files(name, source)
            with _no_retries_without_a_hub(source):
                options = _as_written(_local_files(name))
                rows = datasets.load_dataset(source, configuration, split=split, keep_in_memory=False, **options)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_explain(name, split, error)) from error
    if not len(rows):
        raise ConfigError(_no_rows(name, split))
    is_suspect = looks_misread(rows.column_names) or (_csv_files(name) and _has_long_fields(rows))
    if is_suspect and (problem := _misread_csv(name)):
        raise ConfigError(f"Data set {name!r} cannot be read: {problem}.")
    if max_examples is not None:
        rows = rows.select(range(min(max_examples, len(rows))))
    return rows


_FORMATS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
TEXT_COLUMNS = ("text", "content", "question", "context", "answers")
_OF_LINES = ("json", "csv", "tsv", "text")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_FEW = 3  # number of files shown in a message


def _data_file(name: str) -> Path | None:
    """Return the file that a data set's name refers to, or None if it refers to something else.

    Raises:
        ConfigError: it is a file in an unknown format.
    """
    path = Path(name).expanduser()
    if not path.is_file() or not path.suffix:
        return None  # a plain file that happens to be called ag_news does not hide the hub's
    if _format(path) is None:
        raise ConfigError(
            f"The data set {name!r} is a file in an unknown format. Name one that ends in "
            f"{', '.join(_FORMATS)}, or a directory of such files."
        )
    return path.resolve()


def _check_files(name: str, source: str) -> None:
    """Refuse a directory in which ``datasets`` would silently drop data files, or read other files as data.

    ``datasets`` reads only one format, and if some names contain a split's name (``train.jsonl``), only those files. It
    does not follow links to directories, and reads ``train.jsonl.part`` just like ``train.jsonl``. JSON and text files
    next to another format are usually descriptions, so they are not an error. A directory whose README names the data
    files (``configs``) is not checked.
    """
    directory = Path(source)
    if not directory.is_dir() or _names_its_files(directory / "README.md"):
        return
    entries = sorted(directory.rglob("*"))
    files = [path for path in entries if path.is_file() and _is_data(path.relative_to(directory))]
    formats = {*map(_format, files)} or {*_FORMATS.values()}
    if len({_format(path) for path in files}) > 1:
        suffixes = {"".join(path.suffixes[-2:]) if path.suffix in _COMPRESSED else path.suffix for path in files}
        raise ConfigError(
            f"The data set {name!r} is a directory with files of several formats ({', '.join(sorted(suffixes))}): one "
            "of them would be read and the others dropped. Leave only one format in it, or name a single file."
        )
    for path in entries:
        if problem := _entry_problem(path, path.relative_to(directory), formats):
            raise ConfigError(f"The data set {name!r} is a directory with {path.relative_to(directory)}: {problem}.")
    used = {Path(file) for split in _files_by_split(directory).values() for file in split}
    if used and (dropped := [path for path in files if path not in used]):
        some = ", ".join(str(path.relative_to(directory)) for path in dropped[:_FEW])
        raise ConfigError(
            f"The data set {name!r} is a directory in which {len(dropped)} of {len(files)} files would not be read, "
            f"because other file names there contain the name of a split, but these do not: {some}. Move them away, "
            f"rename them (for example, to train-{dropped[0].name}), or name a single file."
        )


def _entry_problem(path: Path, inside: Path, formats: Collection[str | None]) -> str | None:
    """Return why an entry of a data set's directory would unexpectedly be read or left out, or None.

    Args:
        path: the entry.
        inside: its path relative to the directory.
        formats: formats of the directory's data files; files of other formats are not read in any case.
    """
    if _is_hidden(inside):
        return None
    if path.is_symlink() and path.is_dir() and any(_format(each) in formats for each in path.rglob("*")):
        return "`datasets` does not follow a link to a directory. Copy or link its files instead"
    if path.is_symlink() and not path.exists() and _format(path) in formats:
        return f"it is a link to {str(path.readlink())!r}, which does not exist. Restore that file, or remove the link"
    if path.is_file() and _format(path) in formats and _suffix(path) != (lower := _suffix(path).lower()):
        return f"in a directory, `datasets` reads only files whose names end in lower case. Let it end in {lower}"
    inner = {_FORMATS.get(suffix.lower()) for suffix in path.suffixes}
    if path.is_file() and _format(path) is None and inner & {*formats}:
        return "it would be read as data, although its name does not end like a data file's. Move it away, or rename it"
    return None


def _names_its_files(readme: Path) -> bool:
    """Return whether a README says which file belongs to which split, in the YAML at its start."""
    if not readme.is_file():
        return False
    start, _, rest = readme.read_text(encoding="utf-8", errors="replace").partition("---\n")
    return not start.strip() and re.search(r"^configs:", rest.partition("\n---")[0], re.MULTILINE) is not None


def _is_data(path: Path) -> bool:
    """Return whether a file in a data set's directory holds rows, and is neither hidden nor a description."""
    return not _is_hidden(path) and _format(path) not in (None, "text") and ".json" not in path.suffixes


def _is_hidden(path: Path) -> bool:
    """Return whether ``datasets`` ignores a file in a data set's directory because of its name or a directory's."""
    return path.name.startswith(".") or any(part.startswith((".", "__")) for part in path.parent.parts)


def _files_by_split(directory: Path) -> Mapping[str, Sequence[str]]:
    """Return the files that ``datasets`` would read, by split, or an empty mapping if it finds none."""
    try:
        patterns = datasets.data_files.get_data_patterns(str(directory))
        return datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=str(directory))
    except FileNotFoundError:  # loading will say so
        return {}


def _format(path: Path) -> str | None:
    return _FORMATS.get(_suffix(path).lower())


def _suffix(path: Path) -> str:
    """Return the suffix that names a file's format, before the one that names its compression."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in _COMPRESSED), "")


def _rows_of_file(path: Path, split: str) -> datasets.Dataset:
    files = {"train": glob.escape(str(path))}  # a single file, even with [ or * in its name
    options = _as_written([path])
    builder = _format(path)
    if builder == "tsv":
        builder, options["sep"] = "csv", "\t"
    return datasets.load_dataset(builder, data_files=files, split=split, keep_in_memory=False, **options)


def _as_written(files: Sequence[Path]) -> dict[str, Any]:
    """Return the reader options that keep texts as written.

    pandas reads ``None`` and ``NA`` as blank, and the txt reader keeps a byte-order mark as part of the text.

    Raises:
        ConfigError: a compressed txt file starts with such a mark. The txt reader ignores its options for such files.
    """
    formats = {_format(file) for file in files}
    if formats == {"text"}:
        for file in (file for file in files if file.suffix in _COMPRESSED):
            with unpacked(file) as content:
                if content.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                    raise ConfigError(
                        f"{file} starts with a byte-order mark, which would be read as part of its first text. Unpack "
                        "the file, or write it again without the mark."
                    )
        return {"encoding": "utf-8-sig"}
    if formats not in ({"csv"}, {"tsv"}):
        return {}
    names = sorted({name for file in files for name in column_names(file)})
    blank = {name: [""] if name in TEXT_COLUMNS else [*NOT_A_VALUE] for name in names}
    return {"keep_default_na": False, "na_values": blank}


def _source(name: str) -> tuple[str, str | None]:
    """Split a name into a directory or hub name for ``load_dataset``, and the configuration after the colon."""
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
    lengths = {each: len(rows) for each, rows in saved.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    rows = datasets.concatenate_datasets([saved[p.splitname].select(range(p.from_, p.to)) for p in parts])
    # The splits may have had different lengths before they were saved.
    rows.info.splits = datasets.SplitDict({n: datasets.SplitInfo(n, num_examples=lengths[n]) for n in lengths})
    return rows


@contextmanager
def _no_retries_without_a_hub(source: str) -> Iterator[None]:
    """Tell ``datasets`` if the machine is offline, so that a mistyped name fails at once rather than after 24 seconds.

    Data sets in its cache load either way.
    """
    from tutorial_lib.models.loading import hub_reachable  # loads transformers, which local data does not need

    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not (Path(source).is_dir() or hub_reachable())
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _explain(name: str, split: str, error: Exception) -> str:
    """Turn an error of ``datasets`` into a message that says what was wrong and what to write instead."""
    text = " ".join(str(_cause(error)).split())
    embedded = (
        f"a directory with parquet, jsonl, csv or arrow files, one such file, or one of {', '.join(DATASET_NAMES)}"
    )
    if isinstance(error, ConnectionError):
        return (
            f"Data set {name!r} is not a local directory, and the hub cannot be reached to look for it there. "
            f"Without the hub, name {embedded}. ({text})"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"The hub does not have the data set {name!r}, or you have no access to it. Name {embedded}. ({text})"
    if isinstance(error, FileNotFoundError) and error.errno is None:
        directory = Path(_source(name)[0])
        if directory.is_dir() and glob.has_magic(str(directory)):
            return (
                f"Data set {name!r} cannot be read: `datasets` takes [, * and ? in a directory's path as a pattern. "
                "Rename the directory."
            )
        return f"Data set {name!r} has no readable data files. Name {embedded}. ({text})"
    if found := re.search(r"Unknown split .*Should be one of \[(.*)\]", text):
        known = re.findall(r"['\"](.+?)['\"]", found[1])
        return f"Data set {name!r} has no split {split!r}. It has: {', '.join(known)}. {_split_advice(known)}"
    if "corresponds to no data" in text or "BatchSize must be greater than 0" in text:  # the latter is parquet's
        return _no_rows(name, split)
    if "onfig name is missing" in text or re.search(r"BuilderConfig .* not found", text):
        return f"Name the configuration of {name!r} that you want, after a colon: {name.split(':')[0]}:NAME. ({text})"
    if isinstance(error, OSError) and error.errno is not None:  # a damaged archive's error has no errno
        return (
            f"Data set {name!r} cannot be stored on disk: {error}. "
            "Set HF_HOME to a directory that you can write to and that has space left."
        )
    return f"Data set {name!r} cannot be read: {_bad_file(name) or text.rstrip('.') or type(error).__name__}."


def _no_rows(name: str, split: str) -> str:
    return f"Split {split!r} of data set {name!r} has no rows. Write a split, or a slice of one, that has some."


def _cause(error: BaseException) -> BaseException:
    """Return the root cause of an error of ``datasets``, which names the column, the line or the encoding."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _split_advice(known: list[str]) -> str:
    if known == ["train"]:
        return (
            "Write evaluate=False (--no-evaluate) to skip evaluation, or train_split='train[5%:]' and "
            "eval_split='train[:5%]' to keep some of it for evaluation."
        )
    return "Write train_split / eval_split as one of these, or as a slice of one, such as train[90%:]."


def _local_files(name: str) -> list[Path]:
    """Return the data files of a local data set. Descriptions count only in a directory without anything else."""
    path = Path(_source(name)[0]).expanduser()
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    found = [file for file in files if _format(file) and file.is_file() and not _is_hidden(file.relative_to(path))]
    return [file for file in found if _is_data(file.relative_to(path))] or found


def _misread_csv(name: str) -> str | None:
    """Find a CSV file of a local data set that pandas misreads, and describe the problem."""
    for file in _csv_files(name):
        if problem := csv_problem(file):
            return f"{file}, {problem}"
    return None


def _csv_files(name: str) -> list[Path]:
    return [file for file in _local_files(name) if _format(file) in ("csv", "tsv")]


def _has_long_fields(rows: datasets.Dataset) -> bool:
    """Return whether a text spans several lines, as it does in a CSV file after a stray double quote."""
    is_text = (pa.types.is_string, pa.types.is_large_string)
    texts = [column for column in rows.data.itercolumns() if any(each(column.type) for each in is_text)]
    return any(pc.any(pc.match_substring(column, "\n")).as_py() for column in texts)


def _bad_file(name: str) -> str | None:
    """Describe the first file of a local data set that is empty, a git-lfs pointer, not UTF-8, or not valid."""
    for file in _local_files(name):
        if not file.stat().st_size:
            return f"{file}: it is empty"
        if is_lfs_pointer(file):
            return f"{file}: it is a git-lfs pointer, not the data; run `git lfs pull` there, or download the file"
        if problem := damaged_archive(file):
            return f"{file}: {problem}"
        if file.suffix != ".zst" and _format(file) in _OF_LINES and (problem := _bad_line(file)):
            return f"{file}, {problem}"
    return _misread_csv(name)


def _bad_line(file: Path) -> str | None:
    """Describe the first line of a file that is not UTF-8 or, in a file of JSON lines, not JSON."""
    with unpacked(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig")
                if _suffix(file).lower() in (".jsonl", ".ndjson") and text.strip():
                    json.loads(text)
            except UnicodeDecodeError as error:
                encoding = (
                    "UTF-16" if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")) else "another encoding"
                )
                return (
                    f"line {number}: the byte 0x{line[error.start]:02x} is not UTF-8; the file is in {encoding}. "
                    "Save it as UTF-8"
                )
            except ValueError as error:
                return f"line {number}: {error}"
    return None
