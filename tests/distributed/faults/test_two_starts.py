"""Second start of a run that has not ended yet."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.distributed.faults.checks import assert_ends_like
from tests.distributed.observing.comparing import Observed


@pytest.mark.fault(
    "two starts of one run at the same time",
    "the second is refused and told which process holds the run; the first is untouched",
)
def test_two_starts_of_one_run(signalled: dict[str, Any], uninterrupted: dict[str, Observed]) -> None:
    said, pid = signalled["second_start"]
    assert re.search(rf"is already running: process {pid} on \S+, since \d{{4}}-\S+\. Wait until it ends", said)
    assert_ends_like(signalled, uninterrupted["long"])
