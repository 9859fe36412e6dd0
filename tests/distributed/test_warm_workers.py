"""Ranks forked from the warm server compute what new interpreters compute, bit for bit."""

from __future__ import annotations

import pytest

from tests.distributed.cases import equivalence
from tests.distributed.observing.comparing import Observed, assert_identical
from tests.distributed.observing.probe import ProbedRun, observe


@pytest.mark.parametrize("variant", ["zero3", "fsdp-full"])
def test_a_run_of_new_interpreters_matches_forked_ranks(directory, observed, monkeypatch, variant):
    monkeypatch.setenv("TUTORIAL_LIB_WARM_WORKERS", "0")
    config = equivalence.variant(directory, "gpt2", variant, 2, name=f"cold-{variant}")
    observe([ProbedRun(config)])
    assert_identical(Observed.read(config), observed(2, f"gpt2.{variant}.2"))
