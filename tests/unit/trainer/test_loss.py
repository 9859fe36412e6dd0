"""Loss of an optimizer step: every token has the same weight, and a step without tokens is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tutorial_lib.config import ConfigError
from tutorial_lib.mpu import Topology
from tutorial_lib.trainer import count_targets, count_tokens, sum_over_ranks, token_loss_sum

ALONE = Topology(dp=1, tp=1, rank=0)


def batch(*rows):
    labels = torch.tensor(rows)
    return {"input_ids": labels.clamp(min=0), "labels": labels}


def test_a_token_counts_if_it_is_a_target():
    """Nothing predicts the first token of a row, and -100 marks tokens that are no targets."""
    one, other = batch([7, 8, -100, 9], [7, -100, -100, 3]), batch([1, 2, 3, 4])
    assert [count_targets(each["labels"]) for each in (one, other)] == [3, 3]
    assert count_tokens([one, other], ALONE) == 6
    logits = torch.randn(2, 4, 10, dtype=torch.bfloat16)
    expected = sum(F.cross_entropy(logits[row, at].float(), torch.tensor(token))
                   for row, at, token in [(0, 0, 8), (0, 2, 9), (1, 2, 3)])  # fmt: skip
    assert float(token_loss_sum(logits, one["labels"])) == pytest.approx(float(expected), rel=1e-6)


def test_a_step_of_masked_labels_is_refused():
    with pytest.raises(ConfigError, match=r"No token of this step enters the loss: .*Raise seq_length \(3\)"):
        count_tokens([batch([5, -100, -100])], ALONE)
    with pytest.raises(ConfigError, match="No token of step 4 enters the loss"):
        count_tokens([batch([5, -100, -100])], ALONE, step=4)


@pytest.mark.parametrize("value", [0.1, -1e300, 3])
def test_a_sum_over_one_rank_is_its_value_bit_for_bit(value):
    assert sum_over_ranks(value, ALONE) == value
    assert sum_over_ranks(torch.tensor(value, dtype=torch.float64), ALONE) == value
