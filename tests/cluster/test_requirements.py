"""Refusals of the cluster tests, which say what is missing. The tests here need neither root nor SLURM."""

from __future__ import annotations

import pytest

from tests.cluster import requirements
from tests.cluster.requirements import missing_for_slurm, missing_tools, skip_for


def test_a_user_without_root_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for reason in (missing_tools(), missing_for_slurm()):
        assert reason == "virtual nodes need root (sudo -E make cluster)"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "missing_tools", lambda: None)
    monkeypatch.setattr(requirements, "missing_packages", lambda: ["slurm-wlm", "munge"])
    assert missing_for_slurm() == "SLURM on virtual nodes needs slurm-wlm and munge: `make cluster-tools` installs them"


def test_a_missing_requirement_is_an_error_only_in_continuous_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for ci, outcome in {"": pytest.skip.Exception, "true": pytest.fail.Exception}.items():
        monkeypatch.setenv("CI", ci)
        with pytest.raises((pytest.skip.Exception, pytest.fail.Exception), match="need root") as raised:
            skip_for(missing_tools())
        assert raised.type is outcome
    skip_for(None)
