"""SQuAD v1.1's rules: the published example, and each rule by itself."""

from __future__ import annotations

import pytest

from tutorial_lib.trainer.squad import AnswerScore, SquadScore, average_scores, score_answer


def test_the_published_example() -> None:
    """The example is in the SQuAD v1.1 metric card of Hugging Face's ``evaluate``, which wraps the official script."""
    golds = [["1976"], ["Beyoncé and Bruno Mars"], ["climate change"]]
    answers = ["1976", "Beyonce", "climate change"]
    scores = [score_answer(answer, each) for answer, each in zip(answers, golds, strict=True)]
    assert average_scores(scores) == SquadScore(pytest.approx(200 / 3), pytest.approx(200 / 3))
    assert score_answer("1999", ["1976"]) == AnswerScore(0.0, 0.0)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("DENVER Broncos", "Denver Broncos"),
        ("the Denver Broncos", "Denver Broncos"),
        ("A cat, an owl and the dog.", "cat owl and dog"),
        ("  Santa \n Clara,\tCalifornia ", "Santa Clara, California"),
        ("Levi's Stadium", "Levis Stadium"),  # punctuation is removed without leaving a space
        ("24-10", "2410"),
        ("$5,000", "5000"),
    ],
)
def test_differences_that_normalisation_ignores(prediction: str, gold: str) -> None:
    assert score_answer(prediction, [gold]) == AnswerScore(1.0, 1.0)


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("24\u201310", "2410", 0.0),  # only ASCII punctuation is removed
        ("another", "other", 0.0),  # articles are removed only if they are words
        ("theatre", "atre", 0.0),
        ("Beyoncé", "Beyonce", 0.0),
    ],
)
def test_differences_that_normalisation_keeps(prediction: str, gold: str, f1: float) -> None:
    assert score_answer(prediction, [gold]) == AnswerScore(0.0, f1)


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("Santa Clara", "Santa Clara, California", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("in Santa Clara today", "Santa Clara", 2 * 0.5 * 1 / 1.5),
        ("Clara Santa", "Santa Clara", 1.0),  # order does not matter to F1
        # In multisets, a word counts as often as it occurs in both texts. With sets, these would be 1, 1 and 1 / 2.
        ("new york new york", "new york", 2 * 0.5 * 1 / 1.5),
        ("no", "no no no", 2 * 1 * (1 / 3) / (4 / 3)),
        ("no no yes", "no no no maybe", 2 * (2 / 3) * 0.5 / (2 / 3 + 0.5)),
    ],
)
def test_f1_over_multisets(prediction: str, gold: str, f1: float) -> None:
    assert score_answer(prediction, [gold]) == AnswerScore(0.0, pytest.approx(f1))


def test_the_best_gold_answer_counts() -> None:
    golds = ["Super Bowl L", "L", "the fiftieth Super Bowl"]
    assert score_answer("L", golds) == AnswerScore(1.0, 1.0)
    assert score_answer("fiftieth Bowl", golds) == AnswerScore(0.0, pytest.approx(0.8))


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("", "1976", AnswerScore(0.0, 0.0)),
        ("the", "1976", AnswerScore(0.0, 0.0)),
        # In v1.1, these are equal after normalisation, but share no word. v2 gives F1 = 1.
        ("the", "!", AnswerScore(1.0, 0.0)),
        ("", "", AnswerScore(1.0, 0.0)),
    ],
)
def test_empty_answers(prediction: str, gold: str, expected: AnswerScore) -> None:
    assert score_answer(prediction, [gold]) == expected


def test_scores_of_several_ranks_average_over_questions() -> None:
    ranks = [[score_answer("a cat", ["cat"])], [score_answer("dog", ["cat"]), score_answer("red cat", ["cat"])]]
    assert average_scores([score for rank in ranks for score in rank]) == SquadScore(
        pytest.approx(100 / 3), pytest.approx(100 * (1 + 0 + 2 / 3) / 3)
    )


def test_answers_that_cannot_be_scored_are_refused() -> None:
    for golds in ([], "1976"):
        with pytest.raises(ValueError, match=r"such as \['1976'\]"):
            score_answer("1976", golds)
    with pytest.raises(ValueError, match="at least one question"):
        average_scores([])
