"""Ranks forked from the warm server compute what new interpreters compute, bit for bit."""

from __future__ import annotations

import pytest

from tests.distributed import cases
from tests.distributed.comparing import Observed, assert_identical
from tests.distributed.launching import observe
from tests.distributed.probe import ProbedRun


@pytest.mark.parametrize("variant", ["zero3", "fsdp-full"])
def test_a_run_of_new_interpreters_matches_forked_ranks(directory, observed, monkeypatch, variant):
    monkeypatch.setenv("TUTORIAL_LIB_WARM_WORKERS", "0")
    config = cases.variant(directory, "gpt2", variant, 2, name=f"cold-{variant}")
    observe([ProbedRun(config)])
    assert_identical(Observed.read(config), observed(2, f"gpt2.{variant}.2"))
