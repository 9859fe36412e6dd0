"""Mutants: runs with one deliberate fault each, for which the usual comparison must fail."""

from __future__ import annotations

import importlib
import inspect

import pytest

from tests.distributed.cases import crashing, equivalence, interruption, reshaping
from tests.distributed.observing.comparing import STAGE_0_IN_BF16, allowed, compare

PAGES = ("data", "update", "tensor_parallel", "restore", "killed", "storage")
"""Modules of :mod:`tests.distributed.injected` with faults of local runs."""

SHOWN_BY = {
    "data.same_data_on_each_rank": {"examples", "loss", "grad_norm", "parameters", "exp_avg"},
    "data.sharded_over_a_larger_grid": {"examples", "tokens", "loss", "grad_norm", "parameters", "exp_avg"},
    "data.padding_in_the_loss": {"tokens", "loss", "grad_norm", "parameters", "exp_avg"},
    # The norm is reported as it was before clipping.
    "update.clipping_dropped": {"loss", "parameters", "exp_avg", "exp_avg_sq"},
    "update.clipping_left_to_the_default": {"loss", "parameters", "exp_avg", "exp_avg_sq"},
    "update.mean_of_means": {"loss", "grad_norm", "parameters", "exp_avg", "exp_avg_sq"},
    "update.loss_of_own_tokens": {"tokens", "loss", "grad_norm", "parameters", "exp_avg"},
    # Adam's update hardly depends on the length of the gradient.
    "update.gradients_summed": {"grad_norm", "exp_avg", "exp_avg_sq"},
    # Clipping hides the wrong length of a gradient everywhere except in the reported norm.
    "update.gradients_averaged_twice": {"grad_norm"},
    # Each rank trains replicated parameters with its own part of the gradient.
    "tensor_parallel.column_all_reduce_skipped": {
        "loss", "grad_norm", "parameters", "exp_avg", "exp_avg_sq", "ranks_agree"
    },
    "tensor_parallel.columns_not_moved": {"loss", "grad_norm", "parameters", "exp_avg"},
    "tensor_parallel.replicated_gradients_counted_twice": {"grad_norm", "exp_avg"},
    "tensor_parallel.slopes_of_the_first_heads": {"loss", "grad_norm", "parameters", "exp_avg"},
}  # fmt: skip
"""Quantities that each fault must change. It may change others, too."""


def faults_on(page: str) -> set[str]:
    """Return the names of a module's faults, which are its context managers."""
    module = importlib.import_module(f"tests.distributed.injected.{page}")
    return {
        f"{page}.{name}"
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and inspect.isgeneratorfunction(inspect.unwrap(function))
    }


def test_every_injected_fault_is_in_one_run():
    local = (equivalence.MUTANTS, equivalence.SELF_DETECTED_FAULTS, interruption.RESUME_FAULTS)
    runs = [*local, reshaping.RESHAPE_FAULTS, crashing.FATAL]
    in_runs = ["storage.read_only", *(fault for faults in runs for fault in faults)]
    assert sorted(in_runs) == sorted(set().union(*map(faults_on, PAGES)))
    assert SHOWN_BY.keys() | {"update.trial_step_kept"} == equivalence.MUTANTS.keys()


@pytest.mark.parametrize("fault", SHOWN_BY)
def test_the_comparison_detects_a_fault(observed, fault):
    case, variant = equivalence.MUTANTS[fault]
    run, reference = observed(2, fault), observed(1, f"{case}.reference")
    found = compare(run, reference, **allowed(run.config)).found
    assert SHOWN_BY[fault] <= set(found), found
    without_fault = compare(observed(2, f"{case}.{variant}.2"), reference, **allowed(run.config))
    assert not without_fault.found


def test_the_first_loss_can_be_right_with_a_wrong_gradient(observed):
    """The first step's loss does not show that ranks were weighted wrongly, so gradients must be compared."""
    run, reference = observed(2, "update.mean_of_means"), observed(1, "uneven.reference")
    assert abs(run.rows[0]["loss"] - reference.rows[0]["loss"]) < 1e-6
    assert run.rows[0]["grad_norm"] != pytest.approx(reference.rows[0]["grad_norm"], rel=5e-6)


def test_the_comparison_detects_deepspeeds_trial_step(observed):
    """Without ZeRO, DeepSpeed's 16-bit optimizer takes a step when it is constructed, which the engine should undo."""
    run, reference = observed(2, "update.trial_step_kept"), observed(2, "gpt2.zero1-bf16.2")
    assert compare(run, reference, **STAGE_0_IN_BF16).found
