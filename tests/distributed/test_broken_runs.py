"""Broken runs: each has one deliberate fault and is compared like a sound run, and the comparison must fail."""

from __future__ import annotations

import pytest

from tests.distributed import cases, worker
from tests.distributed.comparing import compare
from tests.distributed.test_equivalence import STAGE_0_IN_BF16, allowed

SHOWN_BY = {
    "same_data_on_each_rank": {"examples", "loss", "grad_norm", "parameters", "exp_avg"},
    "sharded_over_a_larger_grid": {"examples", "tokens", "loss", "grad_norm", "parameters", "exp_avg"},
    "padding_in_the_loss": {"tokens", "loss", "grad_norm", "parameters", "exp_avg"},
    # The norm is reported as it was before clipping.
    "clipping_dropped": {"loss", "parameters", "exp_avg", "exp_avg_sq"},
    "clipping_left_to_the_default": {"loss", "parameters", "exp_avg", "exp_avg_sq"},
    "mean_of_means": {"loss", "grad_norm", "parameters", "exp_avg", "exp_avg_sq"},
    "loss_of_own_tokens": {"tokens", "loss", "grad_norm", "parameters", "exp_avg"},
    # Adam's update hardly depends on the length of the gradient.
    "gradients_summed": {"grad_norm", "exp_avg", "exp_avg_sq"},
    # Each rank trains replicated parameters with its own part of the gradient.
    "column_all_reduce_skipped": {"loss", "grad_norm", "parameters", "exp_avg", "exp_avg_sq", "ranks_agree"},
    # Clipping hides a wrong length from everything but the norm that is reported.
    "gradients_averaged_twice": {"grad_norm"},
    "columns_not_moved": {"loss", "grad_norm", "parameters", "exp_avg"},
    "whole_gradients_counted_twice": {"grad_norm", "exp_avg"},
    "slopes_of_the_first_heads": {"loss", "grad_norm", "parameters", "exp_avg"},
}
"""Quantities in which each fault must show, at least."""


def test_every_fault_is_tried():
    continued = cases.CONTINUED_BADLY | cases.RESHAPED_BADLY
    elsewhere = {name.removeprefix("broken-") for name in continued} | {*cases.FATAL, "read_only"}
    noticed = set(cases.REFUSED_RUNS)  # by the run itself, see test_tensor_parallel.py
    assert {*SHOWN_BY, "trial_step_kept"} == set(cases.BROKEN_RUNS) == set(worker.BROKEN) - elsewhere - noticed


@pytest.mark.parametrize("fault", SHOWN_BY)
def test_a_fault_is_seen(observed, fault):
    case, variant = cases.BROKEN_RUNS[fault]
    run, reference = observed(2, f"broken-{fault}"), observed(1, f"{case}.reference")
    found = compare(run, reference, **allowed(run.config)).found
    assert SHOWN_BY[fault] <= set(found), found
    sound = compare(observed(2, f"{case}.{variant}.2"), reference, **allowed(run.config))
    assert not sound.found


def test_a_wrong_gradient_may_leave_the_first_loss_right(observed):
    """The first step's loss does not show that ranks were weighted wrongly: gradients must be compared."""
    broken, reference = observed(2, "broken-mean_of_means"), observed(1, "uneven.reference")
    assert abs(broken.rows[0]["loss"] - reference.rows[0]["loss"]) < 1e-6
    assert broken.rows[0]["grad_norm"] != pytest.approx(reference.rows[0]["grad_norm"], rel=5e-6)


def test_deepspeeds_trial_step_would_be_seen(observed):
    """Without ZeRO, DeepSpeed's 16-bit optimizer takes a step before the first one; the engine undoes it."""
    found = compare(observed(2, "broken-trial_step_kept"), observed(2, "gpt2.zero1-bf16.2"), **STAGE_0_IN_BF16).found
    assert found
