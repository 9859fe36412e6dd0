"""Rows -> documents of tokens, written to disk once per node and memory-mapped by every process.

A *document* is what becomes of one row: its token ids, and how many of the first ones are no target of the loss.

============================== ================================================ ===============================
columns                        document                                         counted in the loss
============================== ================================================ ===============================
``text``                       text, EOS                                        all but the first token
``question, context, answers`` ``Question: q Context: c Answer: a``, EOS        answer and EOS
============================== ================================================ ===============================

The first token is never counted, because nothing before it could predict it.

Rows that do not fit into ``seq_length`` are cut. A text loses its end, and with it the EOS: it goes on, and a model
told otherwise would learn to stop in mid-sentence. A question keeps its answer and EOS, and loses context: from the
end, or from the start where the answer's own words stand at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import pyarrow as pa
from filelock import FileLock

from tutorial_lib.config import ConfigError
from tutorial_lib.embedded import cache_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 2  # Raise it when the same row becomes another document: older files are then not read any more.
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("num_uncounted", pa.int32())])
_QA_COLUMNS = ("question", "context", "answers")
_ROWS_PER_BATCH = 1000

logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """Token ids, how many of the first are no target, and whether tokens are missing for want of room."""

    ids: list[int]
    num_uncounted: int
    is_cut: bool


@dataclass(frozen=True, slots=True)
class TokenSummary:
    """What became of a split's rows, kept beside their documents.

    Attributes:
        sha256: of all documents in order: their tokens, their borders and which tokens are no targets.
        num_rows: rows that were read.
        num_left_out: rows that gave no document.
        num_cut: documents that lost tokens because they were longer than ``seq_length``.
    """

    sha256: str
    num_rows: int
    num_left_out: int
    num_cut: int


def tokenize_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seq_length: int, *, name: str = "this data set"
) -> datasets.Dataset:
    """The documents of ``rows``: columns ``input_ids`` (2 to ``seq_length`` ids) and ``num_uncounted``.

    The first process on a node that asks tokenises, while others wait for its lock; from then on the Arrow file is
    only mapped. Its name is a digest of everything that the documents depend on. Rows that give nothing to learn are
    left out: blank texts, questions without an answer, questions that with their answer fill ``seq_length``.

    Raises:
        ConfigError: columns of neither kind, an unsuitable tokenizer, no documents, a cache that cannot be written.
    """
    to_documents = _document_maker(rows, tokenizer, seq_length, name)
    directory = cache_directory() / "tokens"
    path = directory / f"{_digest(rows, tokenizer, seq_length)}.arrow"
    try:
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    _write(path, rows, to_documents, seq_length, name)
    except OSError as error:
        raise ConfigError(
            f"Tokenised rows cannot be kept in {directory}: {error}. "
            "Set TUTORIAL_LIB_CACHE to a directory that you can write to and that has space."
        ) from error
    return datasets.Dataset.from_file(str(path))


def summary_of(documents: datasets.Dataset) -> TokenSummary:
    """Return the summary that :func:`tokenize_rows` wrote beside these documents."""
    (file,) = documents.cache_files
    return TokenSummary(**json.loads(Path(file["filename"]).with_suffix(".json").read_text()))


def _write(
    path: Path,
    rows: datasets.Dataset,
    to_documents: Callable[[dict[str, list[Any]]], Iterator[Document]],
    seq_length: int,
    name: str,
) -> None:
    """Tokenise into a file beside ``path``, then rename: whoever sees ``path`` sees all of it, and its summary."""
    unfinished = path.with_suffix(".unfinished")
    num_documents = num_cut = 0
    tokens, borders = hashlib.sha256(), hashlib.sha256()
    with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for batch in rows.iter(_ROWS_PER_BATCH):
            documents = [document for document in to_documents(batch) if len(document.ids) > 1]
            num_documents += len(documents)
            num_cut += sum(document.is_cut for document in documents)
            columns = [[document.ids for document in documents], [document.num_uncounted for document in documents]]
            written = pa.record_batch(columns, schema=_SCHEMA)
            writer.write_batch(written)
            tokens.update(written["input_ids"].flatten().to_numpy())
            for column in (written["input_ids"].value_lengths(), written["num_uncounted"]):
                borders.update(column.to_numpy())
    left_out = len(rows) - num_documents
    if not num_documents:
        unfinished.unlink()
        raise ConfigError(
            f"No row of {name} is left: all {left_out} are blank, have no answer, or have a question and answer too "
            f"long for seq_length={seq_length}. Write another split, a larger max_examples, or a larger seq_length."
        )
    if left_out:
        logger.warning("%s: %d of %d rows left out (blank, or too long to keep the answer)", name, left_out, len(rows))
    sha256 = hashlib.sha256(tokens.digest() + borders.digest()).hexdigest()
    summary = TokenSummary(sha256, len(rows), left_out, num_cut)
    path.with_suffix(".json").write_text(json.dumps(asdict(summary)) + "\n")
    os.replace(unfinished, path)


def _digest(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seq_length: int) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = datasets.fingerprint.Hasher.hash(tokenizer)
    else:
        # Left behind by the last call with padding or truncation; calls below set their own.
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    parts = [_FORMAT, rows._fingerprint, state, tokenizer.eos_token_id, seq_length]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _document_maker(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seq_length: int, name: str
) -> Callable[[dict[str, list[Any]]], Iterator[Document]]:
    """The function from a batch of columns to documents that fits the columns."""
    columns = rows.features
    if tokenizer.eos_token_id is None:
        raise ConfigError("The tokenizer has no EOS token, so nothing can say that a text ends. Write another model.")
    if getattr(columns.get("text"), "dtype", None) in ("string", "large_string"):
        return lambda batch: _text_documents(batch, tokenizer, seq_length)
    if all(column in columns for column in _QA_COLUMNS) and "text" in _fields(columns["answers"]):
        if not tokenizer.is_fast:
            raise ConfigError("Finding the answer's tokens needs a fast tokenizer. Write a model that has one.")
        return lambda batch: _qa_documents(batch, tokenizer, seq_length)
    raise ConfigError(
        f"The columns of {name} are {', '.join(columns)}. Needed is either 'text' with strings, or 'question', "
        "'context' and 'answers' as SQuAD has them: {'text': [...], 'answer_start': [...]}. "
        "Rename the columns, or write another data set."
    )


def _fields(feature: Any) -> Mapping[str, Any]:
    return feature if isinstance(feature, Mapping) else {}


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
    # Without padding, truncation or the warning about the model's length: documents are cut here.
    return tokenizer(texts, padding=False, truncation=False, return_attention_mask=False, verbose=False, **options)


def _text_documents(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Iterator[Document]:
    texts = [text for text in batch["text"] if text and text.strip()]
    if not texts:
        return
    for ids in _encode(tokenizer, texts)["input_ids"]:
        ids = _with_eos(ids, tokenizer)
        yield Document(ids[:seq_length], 1, len(ids) > seq_length)


def _qa_documents(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Iterator[Document]:
    texts, spans = [], []
    for question, context, answers in zip(*(batch[column] for column in _QA_COLUMNS), strict=True):
        answer = answers["text"][0].strip() if answers and answers["text"] else ""
        if not answer or not question or context is None:
            continue
        before = f"Question: {question.strip()} Context:"
        prompt = f"{before} {context} Answer:"
        at = answers["answer_start"][0] if answers.get("answer_start") else -1
        # Where the answer stands in the context, in characters of the prompt; the context's start if unknown.
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
) -> Document | None:
    """Remove ``excess`` tokens of context; None if no context would be left.

    Args:
        offsets: the characters of each token, first and one past the last.
        span: in characters, where the context starts (with the blank before it), where the answer in it ends, where
            the context ends, and where the prompt ends.
    """
    context_start, answer_end, context_end, prompt_end = span
    num_prompt = next(i for i, (_, end) in enumerate(offsets) if end > prompt_end)
    if excess <= 0:
        return Document(ids, num_prompt, is_cut=False)
    context = [i for i, (start, end) in enumerate(offsets) if context_start <= start < end <= context_end]
    keep = len(context) - excess
    if keep < 1:
        return None
    up_to_answer = sum(offsets[i][0] < answer_end for i in context)
    first = max(0, up_to_answer - keep)
    removed = {*context[:first], *context[first + keep :]}
    kept = [token for i, token in enumerate(ids) if i not in removed]
    return Document(kept, num_prompt - excess, is_cut=True)
