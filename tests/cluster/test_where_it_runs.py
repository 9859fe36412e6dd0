"""Requirements of the cluster tests: if something is missing, they say what. Needs neither root nor SLURM."""

from __future__ import annotations

import pytest

from tests.cluster import nodes, slurm
from tests.cluster.conftest import skip_for


def test_a_user_without_root_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for reason in (nodes.missing_tools(), slurm.missing()):
        assert reason == "virtual nodes need root"


def test_packages_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "missing_tools", lambda: None)
    monkeypatch.setattr(slurm, "missing_packages", lambda: ["slurm-wlm", "munge"])
    assert slurm.missing() == "SLURM on virtual nodes needs slurm-wlm and munge: `make cluster-tools` installs them"


def test_missing_packages_are_an_error_in_continuous_integration_alone(monkeypatch: pytest.MonkeyPatch) -> None:
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
