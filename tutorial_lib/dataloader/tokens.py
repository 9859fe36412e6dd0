"""Tokenised documents, written to disk once per node and memory-mapped by every process.

A *document* is one row after tokenising: its token ids, and the number of leading ones that are not targets of the
loss.

============================== ================================================ ===============================
columns                        document                                         counted in the loss
============================== ================================================ ===============================
``text``                       text, EOS                                        all but the first token
``question, context, answers`` ``Question: q Context: c Answer: a``, EOS        answer and EOS
``messages``                   the conversation in the chat template, EOS       all but the first token
``content``                    like ``text``                                    all but the first token
============================== ================================================ ===============================

If a data set has columns of several kinds, the first kind in the table is read. An answer may be a string, a list of
strings, or either of them with ``answer_start`` as in SQuAD; the first answer that is not blank is used.

The first token is never counted, because nothing before it could predict it. In a conversation every turn counts, the
user's as well as the assistant's. To learn only the answers, use ``question, context, answers``.

Rows that do not fit into ``seq_length`` are cut. A text loses its end, and with it the EOS: otherwise the model would
learn to stop in mid-sentence. A question keeps its answer and EOS, and loses context from the end. If that would cut
the answer's words, it loses as much as necessary from the start instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import pyarrow as pa
from filelock import FileLock

from tutorial_lib.config import ConfigError
from tutorial_lib.embedded import cache_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 2  # Increase it when the same row gives a different document, so that older files are no longer read.
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("num_uncounted", pa.int32())])
_QA_COLUMNS = ("question", "context", "answers")
_READ_COLUMNS = ("text", "content", "messages", *_QA_COLUMNS)
_ROWS_PER_BATCH = 1000

logger = logging.getLogger(__name__)


class TokenizedDocument(NamedTuple):
    """Token ids, the number of leading ones that are not targets, and whether tokens were cut to fit ``seq_length``."""

    ids: list[int]
    num_uncounted: int
    is_cut: bool


DocumentMaker = Callable[[dict[str, list[Any]]], Iterator[TokenizedDocument]]


@dataclass(frozen=True, slots=True)
class TokenSummary:
    """Summary of tokenising a split, saved next to its documents.

    Attributes:
        sha256: SHA-256 of all documents in order: their tokens, their boundaries, and which tokens are not targets.
        num_rows: rows that were read.
        num_left_out: rows that yielded no document.
        num_cut: documents that lost tokens because they were longer than ``seq_length``.
    """

    sha256: str
    num_rows: int
    num_left_out: int
    num_cut: int


def tokenize_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seq_length: int, *, name: str = "this data set"
) -> datasets.Dataset:
    """Tokenise rows into documents: columns ``input_ids`` (2 to ``seq_length`` ids) and ``num_uncounted``.

    The first process on a node to ask for the documents writes them, while others wait for its lock; after that, all
    just map the Arrow file. The file's name is a hash of everything that the documents depend on. Rows with nothing to
    learn are left out: blank texts, questions without an answer, and questions that fill ``seq_length`` together with
    their answer.

    Raises:
        ConfigError: the columns are unknown, the tokenizer is unsuitable, a text is not UTF-8, there are no documents
            at all, or the cache cannot be written.
    """
    to_documents = document_maker(rows, tokenizer, seq_length, name)
    directory = cache_directory() / "tokens"
    path = directory / f"{_cache_key(rows, tokenizer, seq_length)}.arrow"
    try:
        if not _is_written(path):
            directory.mkdir(parents=True, exist_ok=True)
            # By default, filelock falls back to a plain file, which a killed process would leave behind.
            with FileLock(path.with_suffix(".lock"), fallback_to_soft=False):
                if not _is_written(path):
                    unfinished = path.with_suffix(".unfinished")
                    try:
                        _write(path, unfinished, rows, to_documents, seq_length, name)
                    finally:
                        unfinished.unlink(missing_ok=True)
    except UnicodeDecodeError as error:
        raise ConfigError(f"A text of {name} is not UTF-8: {error}. Write the files again in UTF-8.") from error
    except OSError as error:
        raise ConfigError(
            f"Tokenised rows cannot be stored in {directory}: {error}. "
            "Set TUTORIAL_LIB_CACHE to a directory that you can write to, on a file system with space and with file "
            "locks (flock)."
        ) from error
    return datasets.Dataset.from_file(str(path))


def summary_of(documents: datasets.Dataset) -> TokenSummary:
    """Read the summary that :func:`tokenize_rows` wrote next to these documents."""
    (file,) = documents.cache_files
    return TokenSummary(**json.loads(Path(file["filename"]).with_suffix(".json").read_text()))


def _is_written(path: Path) -> bool:
    return path.exists() and path.with_suffix(".json").exists()


def _write(
    path: Path,
    unfinished: Path,
    rows: datasets.Dataset,
    to_documents: DocumentMaker,
    seq_length: int,
    name: str,
) -> None:
    """Tokenise into ``unfinished``, then rename it, so that ``path`` is always complete and has its summary."""
    num_documents = num_cut = 0
    # Leave out other columns: images, for example, would be decoded.
    read = rows.select_columns([column for column in rows.column_names if column in _READ_COLUMNS])
    readable = _readable_columns(rows.features)
    tokens, boundaries = hashlib.sha256(), hashlib.sha256()
    with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for number, batch in enumerate(read.iter(_ROWS_PER_BATCH)):
            _check_one_kind(batch, readable, number * _ROWS_PER_BATCH, name)
            documents = [document for document in to_documents(batch) if len(document.ids) > 1]
            num_documents += len(documents)
            num_cut += sum(document.is_cut for document in documents)
            columns = [[document.ids for document in documents], [document.num_uncounted for document in documents]]
            written = pa.record_batch(columns, schema=_SCHEMA)
            writer.write_batch(written)
            tokens.update(written["input_ids"].flatten().to_numpy())
            for column in (written["input_ids"].value_lengths(), written["num_uncounted"]):
                boundaries.update(column.to_numpy())
    left_out = len(rows) - num_documents
    if not num_documents:
        raise ConfigError(
            f"No row of {name} is left: all {left_out} are blank, have no answer, or have a question and answer too "
            f"long for seq_length={seq_length}. Write another split, a larger max_examples, or a larger seq_length."
        )
    if left_out:
        logger.warning("%s: %d of %d rows left out (blank, or too long to keep the answer)", name, left_out, len(rows))
    sha256 = hashlib.sha256(tokens.digest() + boundaries.digest()).hexdigest()
    summary = TokenSummary(sha256, len(rows), left_out, num_cut)
    path.with_suffix(".json").write_text(json.dumps(asdict(summary)) + "\n")
    os.replace(unfinished, path)


def _check_one_kind(batch: dict[str, list[Any]], readable: list[str], num_before: int, name: str) -> None:
    """Refuse rows that have nothing in the column that is read, but something in another one that could be read."""
    read, *others = readable
    for other in others:
        for row, (value, dropped) in enumerate(zip(batch[read], batch[other], strict=True), num_before + 1):
            if value is None and dropped:
                raise ConfigError(
                    f"Row {row} of {name} has nothing in the column {read!r}, which is read, but something in "
                    f"{other!r}, which would be dropped. Use the same column in every row."
                )


def _cache_key(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seq_length: int) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = datasets.fingerprint.Hasher.hash(tokenizer)
    else:
        # Padding and truncation are left over from the last call; the calls below set their own.
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    parts = [_FORMAT, rows._fingerprint, state, tokenizer.eos_token_id, tokenizer.chat_template, seq_length]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def document_maker(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seq_length: int, name: str
) -> DocumentMaker:
    """Return the function that turns a batch of these columns into documents.

    Raises:
        ConfigError: the columns are unknown, or the tokenizer cannot make documents from them.
    """
    columns = rows.features
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "The tokenizer has no EOS token to mark the end of a text. Set its eos_token, or choose another model."
        )
    read = next(iter(_readable_columns(columns)), None)
    if read in ("text", "content"):
        return lambda batch: _text_documents(batch[read], tokenizer, seq_length)
    if read == "question":
        if not tokenizer.is_fast:
            raise ConfigError("Finding the answer's tokens needs a fast tokenizer. Choose a model that has one.")
        return lambda batch: _qa_documents(batch, tokenizer, seq_length)
    if read == "messages":
        if not tokenizer.chat_template:
            raise ConfigError(
                f"The column 'messages' of {name} holds conversations, but the tokenizer has no chat template that "
                "says how to write them. Choose a model that has one, or a data set with a column 'text'."
            )
        return lambda batch: _chat_documents(batch["messages"], tokenizer, seq_length, name)
    described = ", ".join(f"{column} ({_describe_type(feature)})" for column, feature in columns.items())
    raise ConfigError(
        f"The columns of {name} are {described}. Use strings in 'text' or 'content'; or 'question', 'context' "
        "and 'answers' as in SQuAD: {'text': [...], 'answer_start': [...]}; or 'messages' of a conversation: "
        "[{'role': ..., 'content': ...}]. Rename or convert the columns, or choose another data set."
    )


def reads_questions(rows: datasets.Dataset) -> bool:
    """Return whether the documents of these rows are questions with a context and answers, as in SQuAD."""
    return _readable_columns(rows.features)[:1] == ["question"]


def _readable_columns(columns: Mapping[str, Any]) -> list[str]:
    """Return the first column of each kind that documents could be made from. The first one is read."""
    question, context, answers = (columns.get(column) for column in _QA_COLUMNS)
    kinds = {
        "text": _is_text(columns.get("text")),
        "question": _is_text(question) and _is_text(context) and _holds_answers(answers),
        "messages": _holds_messages(columns.get("messages")),
        "content": _is_text(columns.get("content")),
    }
    return [column for column, is_readable in kinds.items() if is_readable]


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def _element(feature: Any) -> Any:
    """Return the feature of a list's elements, or None if it is not a list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _holds_answers(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(_may_be_answer(each) for each in (feature.get("text"), _element(feature.get("text"))))
    element = _element(feature)
    return _may_be_answer(feature) or (element and _holds_answers(element))


def _may_be_answer(feature: Any) -> bool:
    # If every value of a column is None, its type is null.
    return _is_text(feature) or getattr(feature, "dtype", None) == "null"


def _holds_messages(feature: Any) -> bool:
    message = _element(feature)
    return isinstance(message, Mapping) and all(_is_text(message.get(key)) for key in ("role", "content"))


def _describe_type(feature: Any) -> str:
    if isinstance(feature, Mapping):
        return f"{{{', '.join(f'{key}: {_describe_type(value)}' for key, value in feature.items())}}}"
    if (element := _element(feature)) is not None:
        return f"list of {_describe_type(element)}"
    return getattr(feature, "dtype", None) or type(feature).__name__


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
    # No padding, no truncation, and no warning about the model's length: this module cuts documents itself.
    try:
        return tokenizer(texts, padding=False, truncation=False, return_attention_mask=False, verbose=False, **options)
    except Exception as error:
        if type(error) is not Exception:  # which is what the tokenizers library raises
            raise
        raise ConfigError(
            f"The tokenizer cannot encode a text: {error}. Add a token for unknown words to the model of its "
            "tokenizer.json, or choose another tokenizer."
        ) from error


def _text_documents(
    texts: list[str | None], tokenizer: PreTrainedTokenizerBase, seq_length: int, **options: Any
) -> Iterator[TokenizedDocument]:
    given = [text for text in texts if text and text.strip()]
    if not given:
        return
    for ids in _encode(tokenizer, given, **options)["input_ids"]:
        ids = _with_eos(ids, tokenizer)
        yield TokenizedDocument(ids[:seq_length], 1, len(ids) > seq_length)


def _chat_documents(
    conversations: list[Any], tokenizer: PreTrainedTokenizerBase, seq_length: int, name: str
) -> Iterator[TokenizedDocument]:
    for message in (message for each in conversations for message in each or ()):
        if message["content"] is None and not message.get("tool_calls"):
            raise ConfigError(
                f"A message of {name}, by the role {message['role']!r}, has no content, and the chat template may "
                'write "None". Remove the message, or write "" as its content.'
            )
    try:
        texts: Any = [tokenizer.apply_chat_template(each, tokenize=False) for each in conversations if each]
    except Exception as error:  # a template can raise an error of its own, or its code can fail
        raise ConfigError(
            f"The tokenizer's chat template rejects a conversation of {name}: {error}. Change the data, or "
            "choose a model with a different template."
        ) from error
    # The template writes the special tokens itself, and may end its text with a newline.
    return _text_documents([text.rstrip() for text in texts], tokenizer, seq_length, add_special_tokens=False)


def _first_answer(answers: Any) -> tuple[str, int]:
    """Return the first answer that is not blank and its start in the context (-1 if unknown)."""
    if isinstance(answers, str):
        return answers.strip(), -1
    if isinstance(answers, Mapping):
        texts, starts = answers["text"], answers.get("answer_start")
        texts = texts if isinstance(texts, list) else [texts]
        starts = starts if isinstance(starts, list) else [starts]
        for text, start in zip_longest(texts, starts):
            if text and text.strip():
                return text.strip(), _position(start)
        return "", -1
    return next((found for found in map(_first_answer, answers or ()) if found[0]), ("", -1))


def _position(start: Any) -> int:
    """Return ``answer_start`` as an integer, even if the file has ``"12"`` or ``12.0``; -1 if it is not a number."""
    try:
        return int(start)
    except (TypeError, ValueError, OverflowError):
        return -1


def gold_answers(answers: Any) -> list[str]:
    """Return all answers that are not blank, in whatever form the data set holds them."""
    if isinstance(answers, Mapping):
        return gold_answers(answers["text"])
    if isinstance(answers, str):
        return [answers.strip()] if answers.strip() else []
    return [text for each in answers or () for text in gold_answers(each)]


def encode_prompt(
    question: str, context: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], bool]:
    """Tokenise a question as a prompt: its document up to, but not including, the answer.

    A context that does not fit loses its end: unlike in training, the position of the answer is unknown here.

    Returns:
        The token ids, and whether the context was cut.

    Raises:
        ConfigError: the question leaves no room for its context in ``max_length`` tokens.
    """
    before, prompt = _prompt(question, context)
    encoded = _encode(tokenizer, [prompt], return_offsets_mapping=True)
    end_of_context = len(before) + 1 + len(context)
    tokens = list(zip(encoded["input_ids"][0], encoded["offset_mapping"][0], strict=True))
    if tokens and tokens[-1][0] == tokenizer.eos_token_id:
        tokens.pop()  # some tokenizers append it themselves
    in_context = [i for i, (_, (start, end)) in enumerate(tokens) if len(before) <= start < end <= end_of_context]
    excess = max(0, len(tokens) - max_length)
    if excess >= max(1, len(in_context)):
        raise ConfigError(
            f"The question {question!r} leaves no room for its context in {max_length} tokens. Write a larger "
            "seq_length (or, for evaluate_answers, a smaller max_new_tokens)."
        )
    removed = set(in_context[len(in_context) - excess :])
    return [token for i, (token, _) in enumerate(tokens) if i not in removed], bool(removed)


def _prompt(question: str, context: str) -> tuple[str, str]:
    """Return the text before the context and the full text before the answer."""
    before = f"Question: {question.strip()} Context:"
    return before, f"{before} {context} Answer:"


def _qa_documents(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Iterator[TokenizedDocument]:
    texts, spans = [], []
    for question, context, answers in zip(*(batch[column] for column in _QA_COLUMNS), strict=True):
        answer, at = _first_answer(answers)
        if not answer or not question or context is None:
            continue
        before, prompt = _prompt(question, context)
        # Find the answer's end within the prompt, in characters. If it is unknown, use the context's start.
        known = at >= 0 and context[at : at + len(answer)] == answer
        answer_end = len(before) + 1 + at + len(answer) if known else len(before)
        texts.append(f"{prompt} {answer}")
        spans.append((len(before), answer_end, len(before) + 1 + len(context), len(prompt)))
    if not texts:
        return
    encoded = _encode(tokenizer, texts, return_offsets_mapping=True)
    for ids, offsets, span in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
        ids = _with_eos(ids, tokenizer)
        document = _cut_context(ids, offsets, span, len(ids) - seq_length)
        if document is not None:
            yield document


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Some tokenizers append their EOS themselves.
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _cut_context(
    ids: list[int], offsets: list[tuple[int, int]], span: tuple[int, int, int, int], excess: int
) -> TokenizedDocument | None:
    """Remove ``excess`` tokens of context, or return None if no context would be left.

    Args:
        ids: tokens of the prompt and the answer.
        offsets: the characters of each token: the first, and one past the last.
        span: positions in characters: the start of the context (with the space before it), the end of the answer within
            it, the end of the context, and the end of the prompt.
        excess: number of tokens to remove.
    """
    context_start, answer_end, context_end, prompt_end = span
    num_prompt = next(i for i, (_, end) in enumerate(offsets) if end > prompt_end)
    if excess <= 0:
        return TokenizedDocument(ids, num_prompt, is_cut=False)
    context = [i for i, (start, end) in enumerate(offsets) if context_start <= start < end <= context_end]
    keep = len(context) - excess
    if keep < 1:
        return None
    up_to_answer = sum(offsets[i][0] < answer_end for i in context)
    first = max(0, up_to_answer - keep)
    removed = {*context[:first], *context[first + keep :]}
    kept = [token for i, token in enumerate(ids) if i not in removed]
    return TokenizedDocument(kept, num_prompt - excess, is_cut=True)
