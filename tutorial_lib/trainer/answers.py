"""Question answering: a trained model's answers to a data set's questions, scored by SQuAD's rules.

The model reads ``Question: q Context: c Answer:``, as in training, and continues it greedily: always the most likely
next token, until EOS. Questions in a batch are padded on the left, so that they all end where the answers begin. The
attention mask hides the padding, and positions count from the first real token, so a question gets the same answer in
every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tutorial_lib.config import ConfigError
from tutorial_lib.dataloader import load_rows
from tutorial_lib.dataloader.tokens import encode_prompt, gold_answers
from tutorial_lib.models import load_model, load_tokenizer
from tutorial_lib.trainer.squad import AnswerScore, SquadScore, average_scores, score_answer


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with the model's answer and its score.

    Attributes:
        question: text of the question.
        prediction: the model's answer, empty if it gave none.
        golds: the correct answers.
        score: the best exact match and F1 over all correct answers.
    """

    question: str
    prediction: str
    golds: tuple[str, ...]
    score: AnswerScore


@dataclass(frozen=True, slots=True)
class AnswerReport:
    """The answers to all questions.

    Attributes:
        score: mean scores in percent.
        answers: one per question, in the order of the data set.
        num_cut: number of questions whose context was too long, so that its end was cut off, perhaps with the answer.
        num_left_out: number of rows without a question, a context or a gold answer.
    """

    score: SquadScore
    answers: tuple[Answered, ...]
    num_cut: int
    num_left_out: int


def evaluate_answers(
    model: str,
    dataset: str = "embedded/qa",
    split: str = "validation",
    *,
    max_examples: int | None = None,
    seq_length: int = 512,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    device: str = "cpu",
) -> AnswerReport:
    """Answer a data set's questions with a model, and score the answers.

    Args:
        model: directory of an export, or any other model name.
        dataset: name of a data set with the columns ``question``, ``context`` and ``answers``.
        split: split of the data set.
        max_examples: use at most this many rows, from the start.
        seq_length: most tokens of question, context and answer together.
        max_new_tokens: most tokens of an answer.
        batch_size: number of questions to answer at once. It changes the speed, never the answers.
        device: device to run the model on.

    Raises:
        ConfigError: there is no such model or data, or the data has no questions.
    """
    rows = load_rows(dataset, split, max_examples=max_examples)
    if missing := {"question", "context", "answers"} - set(rows.column_names):
        raise ConfigError(
            f"Split {split!r} of {dataset!r} has no column {', '.join(sorted(missing))}. Choose a data set with "
            "questions like SQuAD's, such as embedded/qa."
        )
    tokenizer = load_tokenizer(model)
    asked = [row for row in rows if _is_complete(row)]
    if not asked:
        raise ConfigError(f"Split {split!r} of {dataset!r} has no question with a context and an answer.")
    room = seq_length - max_new_tokens
    prompts = [encode_prompt(row["question"], row["context"], tokenizer, room) for row in asked]
    predictions = answer_greedily(
        load_model(model).eval().to(device),
        tokenizer,
        [ids for ids, _ in prompts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    answers = tuple(_score_row(row, prediction) for row, prediction in zip(asked, predictions, strict=True))
    return AnswerReport(
        average_scores([answer.score for answer in answers]),
        answers,
        num_cut=sum(is_cut for _, is_cut in prompts),
        num_left_out=len(rows) - len(asked),
    )


def answer_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Continue each prompt greedily up to EOS, and return the texts in the order of the prompts.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: tokenizer of the model.
        prompts: token ids, without EOS.
        max_new_tokens: most tokens of a continuation.
        batch_size: number of prompts to continue at once; prompts of similar length share a batch.
    """
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: dict[int, str] = {}
    for start in range(0, len(prompts), batch_size):
        numbers = by_length[start : start + batch_size]
        new_BS = _continue(model, tokenizer, [prompts[number] for number in numbers], max_new_tokens)
        answers |= dict(zip(numbers, (_decode_until_eos(ids, tokenizer) for ids in new_BS.tolist()), strict=True))
    return [answers[number] for number in range(len(prompts))]


@torch.no_grad()
def _continue(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> torch.Tensor:
    """Return the new tokens of each prompt, shape (B, S), with padding after EOS."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids_BS = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=model.device)
    # The mask follows positions, not ids, because GPT-2's padding token is also its EOS.
    mask_BS = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
    )
    all_BS: torch.Tensor = model.generate(ids_BS, attention_mask=mask_BS, generation_config=greedy)
    return all_BS[:, width:]


def _decode_until_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    eos = tokenizer.eos_token_id
    until_eos = ids[: ids.index(eos)] if eos in ids else ids
    return str(tokenizer.decode(until_eos, skip_special_tokens=True)).strip()


def _is_complete(row: dict[str, Any]) -> bool:
    return bool(row["question"] and row["context"] and gold_answers(row["answers"]))


def _score_row(row: dict[str, Any], prediction: str) -> Answered:
    golds = gold_answers(row["answers"])
    return Answered(row["question"], prediction, tuple(golds), score_answer(prediction, golds))
