"""Documents made from rows: the tokens that are kept and counted in the loss, and tokenising only once per node."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.dataloader import data_identity, load_rows, tokenize_rows
from tutorial_lib.dataloader.tokens import summary_of
from tutorial_lib.embedded import MODEL_NAMES, dataset_directory, model_directory

from .conftest import write_jsonl

ROW = {
    "question": " Who wrote it?",
    "context": "It is old. Ada wrote it long ago.",
    "answers": {"text": ["Ada"], "answer_start": [11]},
}
PROMPT = "Question: Who wrote it? Context: It is old. Ada wrote it long ago. Answer:"


def documents_of(rows, tokenizer, seq_length=128):
    return list(tokenize_rows(datasets.Dataset.from_list(rows), tokenizer, seq_length))


def read(document, tokenizer):
    """Return the part that is not counted in the loss, and the part that is."""
    ids, n = document["input_ids"], document["num_uncounted"]
    return tokenizer.decode(ids[:n]), tokenizer.decode(ids[n:])


def test_a_text_ends_with_eos_and_all_but_its_first_token_is_counted(byte_tokenizer):
    (document,) = documents_of([{"text": "hello"}], byte_tokenizer)
    assert document["input_ids"] == [*byte_tokenizer("hello")["input_ids"], byte_tokenizer.eos_token_id]
    assert read(document, byte_tokenizer) == ("h", "ello<eos>")


@pytest.mark.parametrize("seq_length, kept", [(7, "hello<eos>"), (6, "hello<eos>"), (5, "hello"), (3, "hel")])
def test_a_text_that_is_cut_has_no_eos(byte_tokenizer, seq_length, kept):
    (document,) = documents_of([{"text": "hello"}], byte_tokenizer, seq_length)
    assert byte_tokenizer.decode(document["input_ids"]) == kept


def test_only_answer_and_eos_tokens_of_a_question_are_counted(byte_tokenizer):
    (document,) = documents_of([ROW], byte_tokenizer)
    assert read(document, byte_tokenizer) == (PROMPT, " Ada<eos>")


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_prompt_and_answer_are_tokenised_as_one_text(name):
    tokenizer = AutoTokenizer.from_pretrained(model_directory(name))
    (document,) = documents_of([ROW], tokenizer)
    assert document["input_ids"] == [*tokenizer(PROMPT + " Ada")["input_ids"], tokenizer.eos_token_id]
    assert read(document, tokenizer) == (PROMPT, " Ada" + tokenizer.eos_token)


@pytest.mark.parametrize(
    "num_removed, context",
    [
        (1, " It is old. Ada wrote it long ago"),
        (5, " It is old. Ada wrote it long"),
        (19, " It is old. Ada"),
        (20, "It is old. Ada"),
        (23, "is old. Ada"),
        (31, "Ada"),
        (33, "a"),
    ],
)
def test_a_long_question_loses_context_but_never_its_answer(byte_tokenizer, num_removed, context):
    seq_length = len(PROMPT + " Ada") + 1 - num_removed
    (document,) = documents_of([ROW], byte_tokenizer, seq_length)
    assert len(document["input_ids"]) == seq_length
    assert read(document, byte_tokenizer) == (f"Question: Who wrote it? Context:{context} Answer:", " Ada<eos>")


def test_without_an_answer_start_the_context_is_kept_from_its_beginning(byte_tokenizer):
    for answers in ({"text": ["Ada"], "answer_start": [30]}, {"text": ["Ada"], "answer_start": []}):
        (document,) = documents_of([{**ROW, "answers": answers}], byte_tokenizer, len(PROMPT + " Ada") + 1 - 31)
        assert read(document, byte_tokenizer)[0] == "Question: Who wrote it? Context: It Answer:"


def test_rows_without_targets_are_left_out_and_counted(byte_tokenizer, caplog):
    texts = [{"text": text} for text in ("", " \n", None, "hello")]
    assert len(documents_of(texts, byte_tokenizer)) == 1
    assert "3 of 4 rows left out" in caplog.text
    unanswered = {**ROW, "answers": {"text": [], "answer_start": []}}
    long = {**ROW, "question": "why " * 30}
    assert len(documents_of([ROW, unanswered, long], byte_tokenizer)) == 1
    assert "2 of 3 rows left out" in caplog.text


def test_having_no_row_left_is_an_error(byte_tokenizer):
    with pytest.raises(ConfigError, match=r"No row of this data set is left: all 2 are blank.*larger max_examples"):
        documents_of([{"text": ""}, {"text": "  "}], byte_tokenizer)
    just_no_context = len("Question: Who wrote it? Context: Answer: Ada") + 1
    assert len(documents_of([ROW], byte_tokenizer, just_no_context + 1)) == 1
    with pytest.raises(ConfigError, match=rf"too long for seq_length={just_no_context}.*larger seq_length"):
        documents_of([ROW], byte_tokenizer, just_no_context)


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"body": "x", "label": 1}, r"body \(string\), label \(int64\)"),
        ({"question": "x", "context": "y"}, r"question \(string\), context \(string\)"),
        ({"text": 3}, r"text \(int64\)"),
        ({"text": ["x"]}, r"text \(list of string\)"),
        ({**ROW, "answers": 3}, r"answers \(int64\)"),
        ({**ROW, "answers": {"text": 3, "answer_start": 0}}, r"answers \(\{text: int64, answer_start: int64\}\)"),
        ({**ROW, "answers": {"text": [3]}}, r"answers \(\{text: list of int64\}\)"),
        ({**ROW, "answers": {"text": [["Ada"]]}}, r"answers \(\{text: list of list of string\}\)"),
        ({**ROW, "context": 3}, r"context \(int64\)"),
        ({"messages": ["hello"]}, r"messages \(list of string\)"),
    ],
)
def test_unknown_columns_are_named_with_those_needed(byte_tokenizer, row, columns):
    with pytest.raises(ConfigError, match=rf"of this data set are .*{columns}.*Use strings in 'text'.*SQuAD"):
        documents_of([row], byte_tokenizer)


@pytest.mark.parametrize(
    "answers",
    [
        "Ada",
        ["Ada", "she"],
        [None, "Ada"],
        {"text": "Ada"},
        {"text": "Ada", "answer_start": 11},
        {"text": ["Ada"], "answer_start": [None]},
        {"text": [None, " ", "Ada"], "answer_start": [0, 0, 11]},
        {"text": ["Ada"], "answer_start": []},
        [{"text": "Ada", "answer_start": 11}, {"text": "she", "answer_start": 0}],
    ],
)
def test_answers_in_other_forms_are_read_as_text(byte_tokenizer, answers):
    (document,) = documents_of([{**ROW, "answers": answers}], byte_tokenizer)
    assert read(document, byte_tokenizer) == (PROMPT, " Ada<eos>")


@pytest.mark.parametrize("nothing", [None, {"text": [None], "answer_start": [0]}, {"text": None, "answer_start": None}])
def test_rows_without_an_answer_are_left_out(byte_tokenizer, nothing):
    rows = datasets.Dataset.from_list([{**ROW, "answers": nothing}, ROW])
    assert len(tokenize_rows(rows, byte_tokenizer, 128)) == 1
    with pytest.raises(ConfigError, match="No row of this data set is left"):
        documents_of([{**ROW, "answers": nothing}], byte_tokenizer)


@pytest.mark.parametrize("start", [11, "11", 11.0])
def test_an_answer_given_as_one_string_keeps_its_context(byte_tokenizer, start):
    answers = {"text": "Ada", "answer_start": start}
    (document,) = documents_of([{**ROW, "answers": answers}], byte_tokenizer, len(PROMPT + " Ada") + 1 - 31)
    assert read(document, byte_tokenizer)[0] == "Question: Who wrote it? Context:Ada Answer:"


def test_an_answer_start_that_is_not_a_number_counts_as_unknown(byte_tokenizer):
    (document,) = documents_of([{**ROW, "answers": {"text": "Ada", "answer_start": "line 1"}}], byte_tokenizer)
    assert read(document, byte_tokenizer) == (PROMPT, " Ada<eos>")


def test_only_the_text_column_is_read(byte_tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["hello"], "picture": [{"bytes": b"no picture", "path": None}]})
    rows = rows.cast_column("picture", datasets.Image())
    assert len(tokenize_rows(rows, byte_tokenizer, 128)) == 1


def test_a_column_called_content_is_text_where_no_other_is(byte_tokenizer):
    (document,) = documents_of([{"content": "hello", "id": 1}], byte_tokenizer)
    assert read(document, byte_tokenizer) == ("h", "ello<eos>")
    (document,) = documents_of([{"content": "other", "text": "hello"}], byte_tokenizer)
    assert read(document, byte_tokenizer) == ("h", "ello<eos>")


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.mark.parametrize(
    "rows", [[{"text": "one"}, {"content": "two"}], [{"text": "one"}, ROW], [{"messages": TALK}, {"content": "two"}]]
)
def test_rows_with_their_text_in_different_columns_are_refused(rows, byte_tokenizer):
    with pytest.raises(ConfigError, match=r"Row 2 of this data set has nothing in the column '\w+', which is read"):
        documents_of([dict.fromkeys(rows[1]) | rows[0], rows[1]], chat_tokenizer(byte_tokenizer, "{{ messages }}"))


@pytest.mark.parametrize("unread", [{"text": None}, {"question": None}, {"question": "x"}, {"messages": None}])
def test_columns_that_cannot_be_read_do_not_count(unread, byte_tokenizer):
    (document,) = documents_of([unread | {"content": "hello"}], byte_tokenizer)
    assert read(document, byte_tokenizer) == ("h", "ello<eos>")


def chat_tokenizer(byte_tokenizer, template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def test_conversations_are_written_by_the_chat_template(byte_tokenizer):
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>{{ '\\n' }}{% endfor %}"
    rows = [{"messages": TALK}, {"messages": []}]
    (document,) = documents_of(rows, chat_tokenizer(byte_tokenizer, template))
    assert read(document, byte_tokenizer) == ("u", ":Hi<eos>\na:Yo<eos>"), "with one EOS at its end"
    (other,) = documents_of(rows, chat_tokenizer(byte_tokenizer, template.replace(":", "=")))
    assert read(other, byte_tokenizer)[1].startswith("=Hi"), "the cache must depend on the template"


def test_a_message_without_content_is_refused(byte_tokenizer):
    rows = [{"messages": [*TALK, {"role": "user", "content": None}]}]
    with pytest.raises(ConfigError, match="A message of this data set, by the role 'user', has no content"):
        documents_of(rows, chat_tokenizer(byte_tokenizer, "{{ messages[2].content }}"))


def test_conversations_that_cannot_be_written_are_refused(byte_tokenizer):
    with pytest.raises(ConfigError, match=r"'messages' of this data set holds conversations, but .* no chat template"):
        documents_of([{"messages": TALK}], byte_tokenizer)
    strict = chat_tokenizer(byte_tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="rejects a conversation of this data set: roles must alternate"):
        documents_of([{"messages": TALK}], strict)


def test_text_that_is_not_utf_8_is_refused(byte_tokenizer, tmp_path):
    (tmp_path / "train.jsonl").write_bytes('{"text": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"A text of this data set is not UTF-8: .*0xe9.*again in UTF-8"):
        tokenize_rows(load_rows(str(tmp_path), "train"), byte_tokenizer, 32)


def test_special_tokens_that_the_tokenizer_adds_are_kept_once(byte_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(model_directory("embedded/gpt2"))
    bos, eos = tokenizer.convert_tokens_to_ids("!"), tokenizer.eos_token_id
    plain = tokenizer("hello")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"! $A {tokenizer.eos_token}", special_tokens=[("!", bos), (tokenizer.eos_token, eos)]
    )
    (text,) = documents_of([{"text": "hello"}], tokenizer)
    assert text["input_ids"] == [bos, *plain, eos]
    (question,) = documents_of([ROW], tokenizer)
    assert read(question, tokenizer) == ("!" + PROMPT, " Ada" + tokenizer.eos_token)


def test_a_tokenizer_without_eos_is_refused(byte_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(model_directory("embedded/gpt2"))
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no EOS token"):
        documents_of([{"text": "hello"}], tokenizer)


def test_a_text_that_the_tokenizer_has_no_token_for_is_refused():
    words = Tokenizer(WordLevel({"hello": 0, "</s>": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert documents_of([{"text": "hello"}], tokenizer)
    with pytest.raises(ConfigError, match=r"cannot encode a text: WordLevel error: .*Add a token for unknown words"):
        documents_of([{"text": "hello you"}], tokenizer)


class Counted(PreTrainedTokenizerFast):
    """Tokenizer that records each call, and takes so long that another process arrives meanwhile."""

    calls: Path

    def __call__(self, *args, **kwargs):
        with self.calls.open("a") as file:
            file.write("called ")
        time.sleep(0.3)
        return super().__call__(*args, **kwargs)


def test_processes_that_start_together_tokenise_once(tmp_path, byte_tokenizer):
    directory = write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": f"row {i}"} for i in range(20)]).parent
    rows = load_rows(str(directory), "train")
    tokenizer = Counted(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<eos>")
    tokenizer.calls = tmp_path / "calls"
    processes = multiprocessing.get_context("fork")
    barrier, results = processes.Barrier(3), processes.Queue()

    def rank():
        barrier.wait(timeout=60)
        documents = tokenize_rows(rows, tokenizer, 32)
        results.put((sum(map(len, documents["input_ids"])), documents.cache_files[0]["filename"]))

    ranks = [processes.Process(target=rank) for _ in range(3)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(timeout=60)
    assert {tokens for tokens, _ in found} == {sum(len(f"row {i}") + 1 for i in range(20))}
    assert len({file for _, file in found}) == 1
    assert (tmp_path / "calls").read_text() == "called "


def test_another_interpreter_maps_the_file_and_tokenises_nothing(tmp_path, byte_tokenizer, toy_directory):
    """Equality within a process does not imply equality across processes, where strings have different hashes."""
    byte_tokenizer.save_pretrained(tmp_path)
    here = tokenize_rows(load_rows(toy_directory(30), "train"), byte_tokenizer, 32)
    code = f"""
import datasets
from transformers import PreTrainedTokenizerFast
from tutorial_lib.dataloader import load_rows, tokenize_rows
datasets.config.HF_DATASETS_CACHE = {str(datasets.config.HF_DATASETS_CACHE)!r}
tokenizer = PreTrainedTokenizerFast.from_pretrained({str(tmp_path)!r})
def refuse(*_, **__):
    raise AssertionError("tokenised again")
PreTrainedTokenizerFast.__call__ = refuse
documents = tokenize_rows(load_rows({toy_directory(30)!r}, "train"), tokenizer, 32)
assert isinstance(documents.data, datasets.table.MemoryMappedTable)
print(documents.cache_files[0]["filename"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == here.cache_files[0]["filename"]


def test_a_second_call_maps_the_file_and_tokenises_nothing(byte_tokenizer, toy_directory):
    rows = load_rows(toy_directory(30), "train")
    first = tokenize_rows(rows, byte_tokenizer, 32)

    class Refusing(type(byte_tokenizer)):
        def __call__(self, *args, **kwargs):
            raise AssertionError("tokenised again")

    refusing = Refusing(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<eos>")
    with pytest.raises(AssertionError, match="tokenised again"):
        tokenize_rows(rows, refusing, 31)
    again = tokenize_rows(load_rows(toy_directory(30), "train"), refusing, 32)
    assert again["input_ids"] == first["input_ids"]
    assert again.cache_files == first.cache_files
    assert isinstance(again.data, datasets.table.MemoryMappedTable)


def test_the_file_belongs_to_rows_tokenizer_and_length(tmp_path, byte_tokenizer):
    def file_of(texts, tokenizer=byte_tokenizer, seq_length=32):
        path = write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts])
        return tokenize_rows(load_rows(str(path.parent), "train"), tokenizer, seq_length).cache_files[0]["filename"]

    gpt2 = AutoTokenizer.from_pretrained(model_directory("embedded/gpt2"))
    files = [
        file_of(["one", "two"]),
        file_of(["one", "two"], seq_length=16),
        file_of(["one", "two"], tokenizer=gpt2),
        file_of(["one", "other"]),
    ]
    assert len(set(files)) == 4


def test_earlier_calls_of_the_tokenizer_change_nothing(byte_tokenizer, toy_directory):
    rows = load_rows(toy_directory(30), "train")
    before = tokenize_rows(rows, byte_tokenizer, 32)
    byte_tokenizer(["abc"], truncation=True, max_length=2)
    after = tokenize_rows(rows, byte_tokenizer, 32)
    assert after.cache_files == before.cache_files


def test_files_left_by_a_killed_process_are_not_read(byte_tokenizer, toy_directory):
    rows = load_rows(toy_directory(31), "train")
    path = Path(tokenize_rows(rows, byte_tokenizer, 32).cache_files[0]["filename"])
    complete = path.read_bytes()
    path.unlink()
    path.with_suffix(".unfinished").write_bytes(complete[: len(complete) // 2])
    assert len(tokenize_rows(rows, byte_tokenizer, 32)) == 31
    assert path.read_bytes() == complete
    assert not path.with_suffix(".unfinished").exists()


def test_tokenising_that_fails_leaves_no_partial_file(byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TUTORIAL_LIB_CACHE", str(tmp_path))
    rows = [{"text": "hello", "content": None}] * 1000  # a batch, which is written
    rows.append({"text": None, "content": "hello"})
    with pytest.raises(ConfigError, match="Row 1001 of this data set has nothing in the column 'text'"):
        documents_of(rows, byte_tokenizer)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(byte_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUTORIAL_LIB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be stored in .*file/tokens.*Set TUTORIAL_LIB_CACHE"):
        documents_of([{"text": "hello"}], byte_tokenizer)


def test_a_cache_that_cannot_be_locked_is_named(byte_tokenizer, tmp_path, monkeypatch):
    """Without flock, filelock would by default use a plain file, which a process killed on any node leaves behind."""

    def no_locks(*given):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setenv("TUTORIAL_LIB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot be stored in .*tokens.*not implemented.* with file locks \(flock\)"):
        documents_of([{"text": "hello"}], byte_tokenizer)
    with pytest.raises(ConfigError, match=r"embedded/qa could not be written .* with file locks \(flock\)"):
        dataset_directory("embedded/qa")


# ----------------------------------------------------------------------------------------------- identity of the data


def test_data_are_identified_by_their_tokens_in_order(tmp_path, byte_tokenizer):
    def identity(train, evaluation, **flat):
        for split, texts in (("train", train), ("validation", evaluation)):
            write_jsonl(tmp_path / f"{split}.jsonl", [{"text": text} for text in texts])
        config = Config.create(dataset=str(tmp_path), seq_length=8, **flat)
        return data_identity(config.data, config.run, byte_tokenizer)

    known = identity(["one", "two", "three"], ["four"])
    assert known.keys() == {"train", "eval"}
    assert all(len(sha256) == 64 for sha256 in known.values())
    assert identity(["one", "", "two", "three"], ["four"]) == known, "rows that give no tokens do not count"
    changed = [
        identity(["one", "six", "three"], ["four"]),
        identity(["two", "one", "three"], ["four"]),
        identity(["on", "etwo", "three"], ["four"]),
        identity(["one", "two", "three"], ["four"], max_examples=2),
    ]
    assert len({known["train"], *(each["train"] for each in changed)}) == 5
    assert {each["eval"] for each in changed} == {known["eval"]}
    assert identity(["one", "two", "three"], ["five"])["eval"] != known["eval"]
    assert identity(["one", "two", "three"], ["five"], evaluate=False) == {"train": known["train"]}


def test_documents_of_the_same_tokens_and_other_targets_have_another_identity(byte_tokenizer):
    prompt, answer = documents_of([ROW], byte_tokenizer), PROMPT + " Ada"
    text = documents_of([{"text": answer}], byte_tokenizer)
    assert text[0]["input_ids"] == prompt[0]["input_ids"]
    hashes = [
        summary_of(tokenize_rows(datasets.Dataset.from_list([row]), byte_tokenizer, 128)).sha256
        for row in (ROW, {"text": answer})
    ]
    assert hashes[0] != hashes[1]


def test_rows_left_out_and_rows_cut_are_counted(byte_tokenizer):
    def summary(rows, seq_length):
        return summary_of(tokenize_rows(datasets.Dataset.from_list(rows), byte_tokenizer, seq_length))

    texts = [{"text": text} for text in ("", "hello", "he", " ")]
    found = summary(texts, 4)
    assert (found.num_rows, found.num_left_out, found.num_cut) == (4, 2, 1)
    found = summary([ROW, {**ROW, "context": "Ada."}, {**ROW, "answers": {"text": [], "answer_start": []}}], 70)
    assert (found.num_rows, found.num_left_out, found.num_cut) == (3, 1, 1)
