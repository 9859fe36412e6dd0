"""SQuAD scores: exact match and F1 of answers, by the rules of SQuAD v1.1's official evaluation script.

The rules are short and must be followed to the letter, so they are implemented here. torchmetrics would add two
packages. It scores only a complete list, and follows v2 where the versions differ: in v1.1, F1 is 0 for two answers
that are both empty after normalisation.

Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016, section 6.1, and
``evaluate-v1.1.py``, which came with the data set.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """Scores of one answer, each from 0 to 1."""

    exact_match: float
    f1: float


@dataclass(frozen=True, slots=True)
class SquadScore:
    """Means over all questions, in percent, as SQuAD reports them."""

    exact_match: float
    f1: float


def normalize_answer(text: str) -> str:
    """Return lower-case text without ASCII punctuation and articles, its words separated by single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def score_answer(prediction: str, golds: Sequence[str]) -> AnswerScore:
    """Compare an answer with every gold answer, and return the best exact match and the best F1.

    F1 is the harmonic mean of precision and recall over the multiset of words: a word counts as often as it occurs in
    both answers.

    Args:
        prediction: the model's answer.
        golds: the correct answers, at least one.

    Raises:
        ValueError: there is no gold answer, or ``golds`` is a single text instead of a list.
    """
    if isinstance(golds, str) or not golds:
        raise ValueError(f"golds={golds!r} is not a list of gold answers. Write at least one, such as ['1976'].")
    exact_match = any(normalize_answer(prediction) == normalize_answer(gold) for gold in golds)
    return AnswerScore(float(exact_match), max(_f1(prediction, gold) for gold in golds))


def average_scores(scores: Sequence[AnswerScore]) -> SquadScore:
    """Return the means in percent. With several ranks, first gather their scores, so that each question counts once.

    Raises:
        ValueError: there is no score.
    """
    if not scores:
        raise ValueError("There is no score to average: answer at least one question.")
    exact_match = 100 * sum(score.exact_match for score in scores) / len(scores)
    return SquadScore(exact_match, 100 * sum(score.f1 for score in scores) / len(scores))


def _f1(prediction: str, gold: str) -> float:
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(gold).split()
    num_same = (Counter(predicted) & Counter(expected)).total()
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(expected)
    return 2 * precision * recall / (precision + recall)
