"""Refusals of the cluster tests, which say what is missing. The tests here need neither root nor SLURM."""

from __future__ import annotations

import pytest

from tests.cluster import requirements
from tests.cluster.requirements import missing_for_slurm, missing_tools, skip_for


def test_a_user_without_root_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for reason in (missing_tools(), missing_for_slurm()):
        assert reason == "virtual nodes need root"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "missing_tools", lambda: None)
    monkeypatch.setattr(requirements, "missing_packages", lambda: ["slurm-wlm", "munge"])
    assert missing_for_slurm() == "SLURM on virtual nodes needs slurm-wlm and munge: `make cluster-tools` installs them"


def test_missing_packages_are_an_error_only_in_continuous_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    packages, root = "needs munge: `make cluster-tools` installs them", "virtual nodes need root"
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs munge"):
        skip_for(packages)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="needs munge"):
        skip_for(packages)
    with pytest.raises(pytest.skip.Exception, match="need root"):
        skip_for(root)
    skip_for(None)
