"""Equivalence: every engine on any grid of ranks equals plain torch in one process, down to the moments.

In fp32, losses, gradient norms, parameters and moments agree within 1e-6 (relative where they exceed 1). Moments, which
are small, also agree within 2e-5 of each tensor's largest value. Bounds are wider where DeepSpeed itself rounds more
coarsely than torch:

- Stage 0 clips by a norm that it sums in fp32. That norm is off by 1e-5 here, and so are the moments, which may differ
  by 1e-4.
- Offload clips by such a norm, too, and reports it, so norms may differ by 1e-5. Its CPU Adam holds 1 - beta2 = 0.001
  in fp32, which makes every second moment 1.3e-5 smaller, so moments may differ by 1e-4.

With Adam's usual epsilon, a weight whose gradient is only rounding error may move by the learning rate at every step,
in either direction. Losses and norms still agree to 1e-6, and only such weights differ by more than 1e-4.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.cases.equivalence import CASES, COMBINATIONS, VARIANTS, among_runs, settings
from tests.distributed.cases.small_runs import STEPS
from tests.distributed.observing.comparing import STAGE_0_IN_BF16, allowed, assert_equal

BF16 = [each for each in COMBINATIONS if settings(each)["precision"] == "bf16"]
FP32 = [each for each in COMBINATIONS if each not in BF16]


@pytest.mark.parametrize(("ranks", "case", "variant"), FP32)
def test_training_matches_one_torch_process(observed, record_property, ranks, case, variant):
    run = observed(ranks, f"{case}.{variant}.{ranks}")
    differences = assert_equal(run, observed(1, f"{case}.reference"), **allowed(run.config))
    record_property("largest_differences", differences.largest)


@pytest.mark.parametrize("case", CASES)
def test_each_case_exercises_its_subject(observed, case):
    """A case that did not exercise its subject would not prove that the engines agree on it."""
    run = observed(1, f"{case}.reference")
    first = run.rows[0]
    assert len(run.rows) == STEPS
    assert first["loss"] != run.rows[-1]["loss"]
    limit = run.config.optimizer.gradient_clipping
    tied = "lm_head.weight" not in run.parameters
    if case == "gpt2":
        assert all(row["grad_norm"] > limit for row in run.rows), "clipping is active"
        assert tied
    if case == "untied":
        assert limit == 0 and all(row["grad_norm"] > 1 for row in run.rows), "DeepSpeed's default limit would clip"
        assert not tied
        assert len({row["lr"] for row in run.rows}) == STEPS
        assert first["tokens"] < run.config.run.global_batch * 40, "most labels are masked"
    if case.startswith("frozen"):
        assert run.moments.keys() < run.parameters.keys()
        first = ".layers.0." if case == "frozen-split" else ".h.0."
        assert any(first in name for name in run.parameters) and not any(first in name for name in run.moments)


@pytest.mark.parametrize(
    ("ranks", "name"), among_runs([(2, "usual.zero0.2"), (2, "usual.zero3.2"), (4, "usual.zero2.4")])
)
def test_with_the_usual_epsilon_only_weights_without_a_gradient_differ(observed, ranks, name):
    """GPT-2's key biases have no gradient, because they shift all scores of a query equally, which softmax ignores."""
    run, reference = observed(ranks, name), observed(1, "usual.reference")
    for name, expected in reference.parameters.items():
        difference = (run.parameters[name] - expected).abs()
        if name.endswith("c_attn.bias"):
            query, _, value = difference.chunk(3)
            difference = torch.cat([query, value])
        assert difference.max() < 1e-4, name


def test_ranks_hold_very_different_numbers_of_tokens(observed):
    by_rank = torch.tensor(observed(4, "uneven.zero2.4").tokens_by_rank)
    assert (by_rank.max(0).values / by_rank.min(0).values).max() > 5
    assert (observed(2, "gpt2.zero2.2").tokens_by_rank[0]) != observed(2, "gpt2.zero2.2").tokens_by_rank[1]


def test_accumulation_is_really_used(observed):
    assert observed(1, "untied.zero3-accumulated.1").config.accumulation == 8
    assert observed(2, "gpt2.zero2-accumulated.2").config.accumulation == 4
    assert observed(4, "gpt2.zero2-accumulated.4").config.accumulation == 2


@pytest.mark.parametrize("case", CASES)
def test_a_steps_examples_do_not_depend_on_the_number_of_ranks(observed, case):
    """Together, the ranks read every example exactly once. The runs themselves are compared above."""
    expected = observed(1, f"{case}.reference").examples
    assert all(len(step) == CASES[case].get("global_batch", 8) for step in expected)
    for ranks in (2, 4):
        variant = next(iter(VARIANTS[ranks][case]))
        assert observed(ranks, f"{case}.{variant}.{ranks}").examples == expected


BF16_AGAINST_FP32 = {"tolerance": 2e-3, "grad_norm": 1e-2, "parameters": 1e-2, "moments": 0.15}
"""Tolerances for bf16. Rounding to its 8 significant bits changes a number by up to 2^-8 = 4e-3 of its size."""


@pytest.mark.parametrize(("ranks", "case", "variant"), BF16)
def test_bf16_stays_near_fp32(observed, record_property, ranks, case, variant):
    run = observed(ranks, f"{case}.{variant}.{ranks}")
    differences = assert_equal(run, observed(1, f"{case}.reference"), **BF16_AGAINST_FP32)
    record_property("largest_differences", differences.largest)


@pytest.mark.parametrize(
    ("ranks", "name", "bounds"),
    among_runs([(2, "gpt2.zero0-bf16.2", STAGE_0_IN_BF16), (2, "gpt2.zero2-bf16.2", {}), (2, "gpt2.zero3-bf16.2", {})]),
)
def test_bf16_in_every_stage_matches_stage_1(observed, record_property, ranks, name, bounds):
    """Stages 2 and 3 agree with stage 1 within the bounds of fp32."""
    run, stage_1 = observed(ranks, name), observed(2, "gpt2.zero1-bf16.2")
    record_property("largest_differences", assert_equal(run, stage_1, **bounds).largest)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter_tensor", "reduce_scatter"])
def test_gloo_averages_where_it_is_asked_to(launched, directory, ranks, collective):
    """Older versions of torch silently returned the sum from reduce-scatter (pytorch issue 162338)."""
    launched(ranks)
    outcome = torch.load(directory / "runs" / f"averages-{ranks}.pt", weights_only=True)[collective]
    assert outcome.tolist() == [(ranks + 1) / 2] * 3
