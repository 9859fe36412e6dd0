"""Question answering: a trained model's answers to a data set's questions, scored by SQuAD's rules.

The model reads ``Question: q Context: c Answer:``, as in training, and continues it greedily: always the most likely
next token, until EOS. Questions in a batch are padded on the left, so that they all end where the answers begin. The
attention mask hides the padding, and positions count from the first real token, so a question gets the same answer in
every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.dataloader import load_rows
from tutorial_lib.dataloader.tokens import encode_prompt, gold_answers
from tutorial_lib.models import load_model, load_tokenizer
from tutorial_lib.mpu.collectives import all_gather_objects
from tutorial_lib.trainer.squad import AnswerScore, SquadScore, average_scores, score_answer

MAX_NEW_TOKENS = 32
"""Longest answer, in tokens."""


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
        num_left_out: number of rows that lack a question, a context or a gold answer, or whose question is too long.
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
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    device: str = "cpu",
) -> AnswerReport:
    """Answer a data set's questions with a model, and score the answers.

    Args:
        model: directory of an export, or any other model name.
        dataset: name of a data set with the columns ``question``, ``context`` and ``answers``.
        split: split of the data set.
        max_examples: use at most this many rows, from the start.
        seq_length: largest number of tokens in question, context and answer together.
        max_new_tokens: largest number of tokens in an answer.
        batch_size: number of questions to answer at once. It changes the speed, never the answers.
        device: device to run the model on.

    Raises:
        ConfigError: there is no such model or data, or the data has no questions.
    """
    questions = Questions.read(
        dataset, split, load_tokenizer(model),
        max_examples=max_examples, seq_length=seq_length, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    report = questions.answer(load_model(model).eval().to(device), batch_size)
    assert report is not None  # nothing stops it
    return report


@dataclass(frozen=True)
class Questions:
    """A data set's questions, tokenised as prompts."""

    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    num_cut: int
    num_left_out: int

    @classmethod
    def read(
        cls,
        dataset: str,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_examples: int | None,
        seq_length: int,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Questions:
        """Read a split's questions; the arguments are those of :func:`evaluate_answers`.

        Raises:
            ConfigError: there is no such data, it has no questions, or none fits into ``seq_length``.
        """
        rows = load_rows(dataset, split, max_examples=max_examples)
        if missing := {"question", "context", "answers"} - set(rows.column_names):
            raise ConfigError(
                f"Split {split!r} of {dataset!r} has no column {', '.join(sorted(missing))}. Choose a data set with "
                "questions like SQuAD's, such as embedded/qa."
            )
        asked = [row for row in rows if _is_complete(row)]
        if not asked:
            raise ConfigError(f"Split {split!r} of {dataset!r} has no question with a context and an answer.")
        prompts, too_long = [], None
        for row in asked:
            try:
                prompts.append(
                    (row, *encode_prompt(row["question"], row["context"], tokenizer, seq_length - max_new_tokens))
                )
            except ConfigError as error:  # training leaves such rows out, too
                too_long = error
        if not prompts:
            raise ConfigError(f"No question of split {split!r} of {dataset!r} fits. {too_long}")
        return cls(
            [row for row, _, _ in prompts],
            [ids for _, ids, _ in prompts],
            tokenizer,
            max_new_tokens,
            num_cut=sum(is_cut for _, _, is_cut in prompts),
            num_left_out=len(rows) - len(prompts),
        )

    def answer(
        self,
        model: PreTrainedModel,
        batch_size: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        stops: Callable[[], bool] = lambda: False,
    ) -> AnswerReport | None:
        """Answer the questions and score the answers, or return None if ``stops`` returns True.

        With several data-parallel ranks this is collective: they share the questions. Each rank must answer as many as
        the others, because they may share the parameters, so some ranks answer the first question again.

        Args:
            model: a causal language model, in evaluation mode.
            batch_size: questions to answer at once on a rank.
            dp_rank: number of this rank.
            dp_size: number of ranks.
            stops: called before each batch, with the same answer on every rank.
        """
        count = len(self.prompts)
        own = [number if number < count else 0 for number in range(dp_rank, -(-count // dp_size) * dp_size, dp_size)]
        texts = answer_greedily(
            model, self.tokenizer, [self.prompts[number] for number in own],
            max_new_tokens=self.max_new_tokens, batch_size=batch_size, in_lockstep=dp_size > 1, stops=stops,
        )  # fmt: skip
        if len(texts) < len(own):
            return None
        pairs = [*zip(own, texts, strict=True)]
        gathered = all_gather_objects(pairs) if dp_size > 1 else [pairs]
        said = dict(pair for pairs in gathered for pair in pairs)
        answers = tuple(_score_row(row, said[number]) for number, row in enumerate(self.rows))
        score = average_scores([answer.score for answer in answers])
        return AnswerReport(score, answers, self.num_cut, self.num_left_out)


def read_questions(config: Config, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """Read the questions of a run's evaluation split.

    Raises:
        ConfigError: as for :meth:`Questions.read`.
    """
    data = config.data
    return Questions.read(
        data.name, data.eval_split, tokenizer, max_examples=data.max_eval_examples, seq_length=data.seq_length
    )


def answer_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    in_lockstep: bool = False,
    stops: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Continue each prompt greedily up to EOS, and return the texts in the order of the prompts.

    Return no texts if ``stops``, which is called before each batch, returns True.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: tokenizer of the model.
        prompts: token ids, without EOS.
        max_new_tokens: largest number of tokens in a continuation.
        batch_size: number of prompts to continue at once; prompts of similar length share a batch.
        in_lockstep: whether other ranks do the same with as many prompts, and each forward pass waits for all of them.
        stops: returns whether to stop now, the same on every rank.
    """
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: dict[int, str] = {}
    for start in range(0, len(prompts), batch_size):
        if stops():
            return []
        numbers = by_length[start : start + batch_size]
        new_BS = _continue(model, tokenizer, [prompts[number] for number in numbers], max_new_tokens, in_lockstep)
        answers |= dict(zip(numbers, (_decode_until_eos(ids, tokenizer) for ids in new_BS.tolist()), strict=True))
    return [answers[number] for number in range(len(prompts))]


@torch.no_grad()
def _continue(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    in_lockstep: bool,
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
    all_BS: torch.Tensor = model.generate(
        ids_BS, attention_mask=mask_BS, generation_config=greedy, synced_gpus=in_lockstep
    )
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
