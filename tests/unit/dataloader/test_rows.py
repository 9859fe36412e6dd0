"""Rows of a data set: every kind of source takes the same path, and every kind of mistake has an error message."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.dataloader import load_rows
from tutorial_lib.dataloader.csv_files import NOT_A_VALUE
from tutorial_lib.embedded import DATASET_NAMES
from tutorial_lib.models.loading import hub_reachable

from .conftest import write_jsonl

ONLY_TRAINING = (
    r"no split 'validation'\. It has: train\. Write evaluate=False \(--no-evaluate\).*, or "
    r"train_split='train\[5%:\]' and eval_split='train\[:5%\]'"
)
TEXTS = {"train": ["one", "two", "three"], "validation": ["four"]}


@pytest.fixture
def no_hub(monkeypatch):
    """Make the hub unreachable, even if the tests run with a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub_reachable.cache_clear()
    yield
    hub_reachable.cache_clear()


def write(kind: str, directory: Path) -> None:
    splits = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in TEXTS.items()})
    if kind == "save_to_disk":
        splits.save_to_disk(directory)
        return
    directory.mkdir()
    for split, rows in splits.items():
        path = directory / f"{split}.{kind}"
        if kind == "arrow":
            rows.save_to_disk(directory / "saved")
            (directory / "saved" / "data-00000-of-00001.arrow").rename(path)
            for file in (directory / "saved").iterdir():
                file.unlink()
            (directory / "saved").rmdir()
        else:
            {"parquet": rows.to_parquet, "csv": rows.to_csv, "jsonl": rows.to_json}[kind](path)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "arrow", "save_to_disk"])
def test_directories(kind, tmp_path):
    write(kind, tmp_path / "data")
    for split, texts in TEXTS.items():
        rows = load_rows(str(tmp_path / "data"), split)
        assert list(rows["text"]) == texts
        assert isinstance(rows.data, datasets.table.MemoryMappedTable), "the rows were read into memory"
    assert list(load_rows(str(tmp_path / "data"), "train", max_examples=2)["text"]) == ["one", "two"]
    assert len(load_rows(str(tmp_path / "data"), "train", max_examples=99)) == 3
    assert list(load_rows(str(tmp_path / "data"), "train[1:]")["text"]) == ["two", "three"]
    with pytest.raises(ConfigError, match=r"no split 'test'\. It has: train, validation\. .*eval_split"):
        load_rows(str(tmp_path / "data"), "test")


def test_a_saved_data_set_without_splits_is_a_training_split(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS["train"]}).save_to_disk(tmp_path / "data")
    assert list(load_rows(str(tmp_path / "data"), "train")["text"]) == TEXTS["train"]
    with pytest.raises(ConfigError, match=ONLY_TRAINING):
        load_rows(str(tmp_path / "data"), "validation")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "arrow", "txt", "jsonl.gz"])
def test_a_file_is_a_training_split(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "txt":
        (tmp_path / "rows.txt").write_text("one\ntwo\nthree\n")
    else:
        write(kind.removesuffix(".gz"), tmp_path / "data")
        (tmp_path / "data" / f"train.{kind.removesuffix('.gz')}").rename(f"rows.{kind.removesuffix('.gz')}")
    if kind.endswith(".gz"):
        Path(f"rows.{kind}").write_bytes(gzip.compress(Path("rows.jsonl").read_bytes()))
    for name in (f"rows.{kind}", str(tmp_path / f"rows.{kind}")):
        assert list(load_rows(name, "train")["text"]) == TEXTS["train"]
        assert list(load_rows(name, "train[:2]")["text"]) == ["one", "two"]
        with pytest.raises(ConfigError, match=ONLY_TRAINING):
            load_rows(name, "validation")
    assert Config.create(dataset=f"rows.{kind}").with_absolute_paths().data.name == str(tmp_path / f"rows.{kind}")


def test_a_file_of_an_unknown_format_is_refused(tmp_path):
    (tmp_path / "rows.docx").touch()
    with pytest.raises(ConfigError, match=r"a file in an unknown format\. Name one .* \.jsonl"):
        load_rows(str(tmp_path / "rows.docx"), "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": b'{"text": "x"}\n', "b.jsonl": b'{"txt": "y"}\n'}, "Couldn't cast.* txt: string"),
        ({"train.jsonl": b'{"text": "x"}\n' * 3 + b'{"text": "cut\n'}, r"train\.jsonl, line 4: "),
        ({"train.csv": b"text\ncaf\xe9\n"}, r"train\.csv, line 2: the byte 0xe9 is not UTF-8.* Save it as UTF-8"),
        ({"train.csv": "text\na\n".encode("utf-16")}, r"train\.csv, line 1: .* the file is in UTF-16\. Save it as"),
        ({"train.csv": b"text\na\nb,c,d\n"}, r"train\.csv, line 3: 3 fields, and the first line names 1\. Put a text"),
        ({"train.csv": b'text\na\n"b\nc\n'}, r"train\.csv, line 3: a double quote is opened and never closed"),
        ({"train.csv": b"\n\n"}, r"train\.csv, line 1: it is blank, but must name the columns"),
        ({"a.csv": b"text\na\n", "b.csv": b"text\na\nb,c\n"}, r"b\.csv, line 3: 2 fields"),
        # Files that pandas misreads without an error.
        ({"train.csv": b"id,text\n" + b"1,one,two\n" * 3}, r"train\.csv, line 2: 3 fields, and the first line names 2"),
        ({"train.csv": b"id;text\n1;one\n"}, r"line 1: its fields are separated by semicolons\..*sep=';'"),
        ({"train.csv": b"id\ttext\n1\tone\n"}, "line 1: its fields are separated by tabs"),
        ({"train.csv": b"text,text\none,two\n"}, "line 1: the column 'text' is named twice"),
        ({"train.csv.gz": gzip.compress(b"id,text\n1,one,two\n")}, r"train\.csv\.gz, line 2: 3 fields"),
        (
            {"train.csv": b'text\nI\n"Hi, she said\nand\n"Hi again\nleft\n'},
            r"train\.csv, line 3: .* closed only in line 5",
        ),
        ({"train.tsv": b'id\ttext\n1\t"Hi\n2\tand\n3\t"Hi\n'}, r"train\.tsv, line 2: .* closed only in line 4"),
        ({"train.jsonl.gz": b'{"text": "x"}\n'}, r"train\.jsonl\.gz: Not a gzipped file.* or not compressed"),
        ({"a.jsonl.gz": gzip.compress(b'{"text": "x"}\n')[:-9]}, r"a\.jsonl\.gz: Compressed file ended"),
        ({"a.txt.gz": gzip.compress(b"caf\xe9\n")}, r"a\.txt\.gz, line 1: the byte 0xe9 is not UTF-8"),
        ({"a.json": '[{"text": "x"}]'.encode("utf-16")}, r"a\.json, line 1: .* the file is in UTF-16"),
        ({"a.ndjson": b'\xef\xbb\xbf{"text": "x"}\n{"text":\n'}, r"a\.ndjson, line 2: "),
    ],
)
def test_errors_in_a_file_are_reported_with_their_place(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"cannot be read: .*{message}"):
        load_rows(str(tmp_path), "train")


def test_a_csv_file_that_is_in_order_is_read(tmp_path):
    content = 'id,text,text.1\n1,"one, ""two""\nthree",x\n\n2,' + "long " * 40_000 + ",y\n3\n"
    (tmp_path / "train.csv").write_text(content)
    rows = load_rows(str(tmp_path), "train")
    assert (rows[0]["text"], len(rows[1]["text"]), rows[2]["text"]) == ('one, "two"\nthree', 200_000, None)


def test_a_byte_order_mark_is_not_read_as_text(tmp_path):
    for name, content in (("one.txt", "one\r\ntwo\r\n"), ("many/train.txt", "one\ntwo\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    for name in ("one.txt", "many"):
        assert list(load_rows(str(tmp_path / name), "train")["text"]) == ["one", "two"]


def test_a_byte_order_mark_that_the_reader_would_keep_is_refused(tmp_path):
    (tmp_path / "one.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone\n"))
    for name in (tmp_path / "one.txt.gz", tmp_path):
        with pytest.raises(ConfigError, match=r"one\.txt\.gz starts with a byte-order mark.* Unpack the file"):
            load_rows(str(name), "train")


@pytest.mark.parametrize("name", ["train.jsonl.part", "train.jsonl.bak", "train.jsonl.sha256", "data/more.jsonl.tmp"])
def test_a_leftover_file_is_refused(name, tmp_path):
    for each in ("train.jsonl", name):
        write_jsonl(tmp_path / each, [{"text": "one"}])
    with pytest.raises(ConfigError, match=rf"a directory with {name}: it would be read as data, although its name"):
        load_rows(str(tmp_path), "train")


def test_files_that_are_not_read_do_not_matter(tmp_path):
    directory, notes = tmp_path / "data", tmp_path / "notes"
    write_jsonl(directory / "train.jsonl", [{"text": "one"}])
    for name in ("README.md", "LICENSE", ".gitattributes", "dataset_info.json", "notes.txt.bak", "old.csv.md5"):
        (directory / name).write_text("not a row")
    notes.mkdir()
    (notes / "notes.txt").write_text("not a row")
    (directory / "notes").symlink_to(notes)
    (directory / "missing.txt").symlink_to(tmp_path / "missing.txt")
    assert list(load_rows(str(directory), "train")["text"]) == ["one"]


def test_texts_of_other_formats_are_not_searched(tmp_path, monkeypatch):
    """Texts with several lines are only suspicious in CSV, and finding them means reading every row."""
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one\ntwo"}])
    monkeypatch.setattr(pc, "match_substring", None)
    assert list(load_rows(str(tmp_path), "train")["text"]) == ["one\ntwo"]


def test_links_are_followed_or_refused(tmp_path):
    directory, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for each in (directory / "train-1.jsonl", elsewhere / "train-2.jsonl"):
        write_jsonl(each, [{"text": "one"}])
    link = directory / "train-2.jsonl"
    link.symlink_to(elsewhere / "train-2.jsonl")
    assert len(load_rows(str(directory), "train")) == 2
    (elsewhere / "train-2.jsonl").rename(elsewhere / "train-3.jsonl")
    with pytest.raises(ConfigError, match=r"train-2\.jsonl: it is a link to '.*/train-2\.jsonl', which does not exist"):
        load_rows(str(directory), "train")
    link.unlink()
    (directory / "more").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="a directory with more: `datasets` does not follow a link"):
        load_rows(str(directory), "train")


def test_text_that_pandas_reads_as_missing_is_kept(tmp_path):
    content = "id,text\n1,None\nNA,NA\n3,\n"
    (tmp_path / "train.csv").write_text(content)
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "tabs").mkdir()
    (tmp_path / "tabs" / "train.tsv").write_text(content.replace(",", "\t"))
    for name in ("train.csv", "train.csv.gz", "tabs", "tabs/train.tsv"):
        rows = load_rows(str(tmp_path / name), "train[:3]")
        assert (rows["text"][:], rows["id"][:]) == (["None", "NA", None], [1, None, 3])


@pytest.mark.parametrize(
    ("data", "beside"),
    [
        ("train.csv", "LICENSE.txt"),
        ("train.csv", "info.json"),
        ("train.csv", ".cache/huggingface/x.json"),
        ("train.txt", ".cache/huggingface/x.json"),
    ],
)
def test_texts_are_kept_as_written_beside_files_that_are_not_read(tmp_path, data, beside):
    content = {"train.csv": "text\nNone\nNA\n", "train.txt": "\ufeffNone\nNA\n"}
    (tmp_path / data).write_text(content[data], encoding="utf-8")
    (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / beside).write_text("{}")
    assert load_rows(str(tmp_path), "train")["text"][:] == ["None", "NA"]


def test_words_for_missing_numbers_match_pandas():
    from pandas._libs.parsers import STR_NA_VALUES

    assert set(NOT_A_VALUE) == STR_NA_VALUES


def test_a_slice_of_a_split(tmp_path):
    write("jsonl", tmp_path / "data")
    assert list(load_rows(str(tmp_path / "data"), "train[1:]")["text"]) == ["two", "three"]


def test_changed_files_are_read_again(tmp_path):
    for text in ("old", "new"):
        write_jsonl(tmp_path / "train.jsonl", [{"text": text}])
        assert load_rows(str(tmp_path), "train")["text"][0] == text


def test_relative_directories_and_home(tmp_path, monkeypatch):
    write("jsonl", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("data", "./data", "~/data"):
        assert len(load_rows(name, "train")) == 3


def test_a_configuration_follows_a_colon(tmp_path):
    write_jsonl(tmp_path / "a" / "train.jsonl", [{"text": "of a"}])
    write_jsonl(tmp_path / "b" / "train.jsonl", [{"text": "of b"}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: a/*.jsonl\n- config_name: b\n  data_files: b/*.jsonl\n---\n"
    )
    assert load_rows(f"{tmp_path}:b", "train")["text"][0] == "of b"
    with pytest.raises(ConfigError, match=r"Name the configuration of .* after a colon: .*:NAME.*'a', 'b'"):
        load_rows(str(tmp_path), "train")
    with pytest.raises(ConfigError, match=r"after a colon: .*:NAME.*'a', 'b'"):
        load_rows(f"{tmp_path}:c", "train")


def test_embedded_data_sets_come_from_their_directory(tmp_path, monkeypatch):
    write("parquet", tmp_path / "data")
    monkeypatch.setattr("tutorial_lib.dataloader.rows.dataset_directory", lambda name: tmp_path / "data")
    assert len(load_rows("embedded/news", "train")) == 3


@pytest.mark.parametrize("name", ["ag_news", "someone/something"])
def test_an_unknown_name_without_a_hub(name, no_hub):
    with pytest.raises(ConfigError) as raised:
        load_rows(name, "train")
    message = str(raised.value)
    assert f"{name!r} is not a local directory, and the hub cannot be reached" in message
    assert all(embedded in message for embedded in DATASET_NAMES)
    assert "OfflineModeIsEnabled" in message, "it retried for half a minute"
    assert datasets.config.HF_HUB_OFFLINE is False, "the next call would not look again"


def test_an_unknown_embedded_name():
    with pytest.raises(ConfigError, match="embedded/qa"):
        load_rows("embedded/squad", "train")


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"has no readable data files.*embedded/news"):
        load_rows(str(tmp_path / "missing"), "train")


def test_a_directory_without_data(tmp_path):
    with pytest.raises(ConfigError, match=r"has no readable data files.*parquet.*embedded/news"):
        load_rows(str(tmp_path), "train")


def test_a_torn_file(tmp_path):
    write("parquet", tmp_path / "data")
    path = tmp_path / "data" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"cannot be read: .*Parquet magic bytes"):
        load_rows(str(tmp_path / "data"), "train")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_an_empty_file_is_named(tmp_path, suffix):
    path = tmp_path / f"train.{suffix}"
    path.touch()
    with pytest.raises(ConfigError, match=rf"cannot be read: {path}: it is empty\."):
        load_rows(str(path), "train")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_git_lfs_pointer_is_named(tmp_path, suffix):
    path = tmp_path / f"train.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConfigError, match=rf"cannot be read: {path}: it is a git-lfs pointer"):
        load_rows(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a?.jsonl"])
def test_special_characters_in_file_names_are_not_patterns(tmp_path, name):
    write_jsonl(tmp_path / name, [{"text": "meant"}])
    write_jsonl(tmp_path / "a1.jsonl", [{"text": "another"}])
    assert list(load_rows(str(tmp_path / name), "train")["text"]) == ["meant"]


def test_a_directory_name_that_is_a_glob_pattern_is_refused(tmp_path):
    write("jsonl", tmp_path / "data[1]")
    with pytest.raises(ConfigError, match=r"as a pattern\. Rename the directory"):
        load_rows(str(tmp_path / "data[1]"), "train")


def test_a_directory_of_two_formats_is_refused(tmp_path):
    """datasets would read one of them and drop the other."""
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "train.csv").write_text("text\ntwo\n")
    with pytest.raises(ConfigError, match=r"several formats \(\.csv, \.jsonl\).*or name a single file"):
        load_rows(str(tmp_path), "train")
    (tmp_path / "train.csv").unlink()
    assert load_rows(str(tmp_path), "train")["text"] == ["one"]
    (tmp_path / "more.csv.gz").write_bytes(gzip.compress(b"text\ntwo\n"))
    with pytest.raises(ConfigError, match=r"several formats \(\.csv\.gz, \.jsonl\)"):
        load_rows(str(tmp_path), "train")


@pytest.mark.parametrize("other", ["train.tsv", "train.CSV", "more.csv"])
def test_files_of_another_format_are_refused_unless_the_readme_leaves_them_out(other, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / other).write_text("text\ntwo\n")
    (tmp_path / "README.md").write_text("# My texts\n")
    with pytest.raises(ConfigError, match="several formats"):
        load_rows(str(tmp_path), "train")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: train.jsonl\n---\n")
    assert load_rows(str(tmp_path), "train")["text"] == ["one"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.tsv", 'id\ttext\n1\tone, two\n'), ("rows.ndjson", '{"text": "one, two"}\n'),
     ("ROWS.JSONL", '{"text": "one, two"}\n'), ("rows.CSV", 'text\n"one, two"\n')],
)  # fmt: skip
def test_other_extensions_of_a_format_are_read(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert load_rows(str(tmp_path / name), "train")["text"] == ["one, two"]


@pytest.mark.parametrize("name", ["more.jsonl", "__more.jsonl", "part/more.jsonl", "more.jsonl.gz"])
def test_a_file_that_belongs_to_no_split_is_not_dropped(name, tmp_path):
    """If any file's name contains the name of a split, datasets ignores all files whose names do not."""
    rows = b'{"text": "one"}\n'
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    assert len(load_rows(str(tmp_path), "train")) == 1
    for used in ("train.jsonl", "validation.jsonl", ".hidden.jsonl"):
        (tmp_path / used).write_bytes(rows)
    refused = rf"1 of 3 files would not be read, .*: {name}\. Move .* train-{Path(name).name}"
    with pytest.raises(ConfigError, match=refused):
        load_rows(str(tmp_path), "train")
    (tmp_path / name).rename(tmp_path / f"train-{Path(name).name}")
    assert len(load_rows(str(tmp_path), "train")) == 2


@pytest.mark.parametrize("others", [(), ("a.csv",)])
def test_a_file_whose_name_ends_in_capitals_is_not_dropped(others, tmp_path):
    """In a directory, datasets knows the suffixes of its formats in lower case only."""
    for name in ("B.CSV", *others):
        (tmp_path / name).write_text("text\none\n")
    with pytest.raises(ConfigError, match=r"a directory with B\.CSV: .* lower case\. Let it end in \.csv"):
        load_rows(str(tmp_path), "train")
    (tmp_path / "B.CSV").rename(tmp_path / "B.csv")
    assert len(load_rows(str(tmp_path), "train")) == 1 + len(others)


def test_a_split_without_rows(tmp_path):
    write("jsonl", tmp_path / "data")
    for split in ("train[:0]", "train[5%:1%]"):
        with pytest.raises(ConfigError, match=rf"Split '{re.escape(split)}' of data set .* has no rows"):
            load_rows(str(tmp_path / "data"), split)
    (tmp_path / "empty").mkdir()
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "empty" / "train.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    for name in ("empty", "empty.parquet"):
        with pytest.raises(ConfigError, match=r"Split 'train' of data set .* has no rows"):
            load_rows(str(tmp_path / name), "train")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    write("jsonl", tmp_path / "data")
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    with pytest.raises(ConfigError, match=r"cannot be stored on disk: .*file.*Set HF_HOME"):
        load_rows(str(tmp_path / "data"), "train")
