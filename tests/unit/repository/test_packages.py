"""Packages and versions of Python, on which several files must agree."""

from __future__ import annotations

import re
from importlib import metadata

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.unit.repository.files import PROJECT, ROOT, pins, wanted

BROUGHT_BY_TORCH = re.compile(r"(nvidia|cuda)-|(triton|cupy|pytorch-triton)")
NOT_CUDA = {"nvidia-ml-py"}  # pure Python that calls the driver's library, so it can be installed without a GPU


def test_constraints_are_exact_sorted_and_without_local_versions() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_no_cuda_package_is_pinned() -> None:
    assert {name for name in pins() if BROUGHT_BY_TORCH.match(name)} == NOT_CUDA


def test_the_engines_are_the_versions_the_course_was_measured_with() -> None:
    expected = {"torch": "2.13.0", "deepspeed": "0.19.8", "ray": "2.60.0", "transformers": "5.23.0"}
    assert {name: pins()[name] for name in expected} == expected


def test_every_dependency_is_pinned_and_only_constraints_have_versions() -> None:
    assert [r.name for r in wanted() if canonicalize_name(r.name) not in pins()] == []
    assert [str(r) for r in wanted() if r.specifier] == []


def test_transitive_dependencies_are_pinned_and_installed() -> None:
    """Dependencies of the packages are pinned too, and this environment has exactly those versions."""
    seen: dict[str, str] = {}
    todo = wanted()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = f"{name}{sorted(requirement.extras)}"
        if key in seen or (BROUGHT_BY_TORCH.match(name) and name not in NOT_CUDA):
            continue
        seen[key] = metadata.version(name).split("+")[0]
        for line in metadata.requires(name) or []:
            inner = Requirement(line)
            if not inner.marker or any(inner.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                todo.append(inner)
    installed = {key.split("[")[0]: version for key, version in seen.items()}
    assert {name: version for name, version in installed.items() if pins().get(name) != version} == {}
    assert len(installed) > 100  # so the loop did visit them


def test_conda_and_binder_get_the_same_packages_on_the_same_python() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    assert pip == ["-c constraints.txt", "-e .[dev]"]
    assert [line for line in plain if "=" in line] == [f"python{PROJECT['project']['requires-python']}"]
    assert "pip" in plain


def test_the_same_pythons_everywhere() -> None:
    """The tools check against the oldest. Continuous integration runs all of them, and the matrix only the newest."""
    pythons = SpecifierSet(PROJECT["project"]["requires-python"])
    supported = [f"3.{minor}" for minor in range(8, 20) if pythons.contains(f"3.{minor}.0")]
    assert supported == ["3.11", "3.12", "3.13"]
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert PROJECT["tool"]["mypy"]["python_version"] == "3.11"
    for workflow, expected in (("ci", "${{ matrix.python }}"), ("matrix", "3.13")):
        (job,) = yaml.safe_load((ROOT / f".github/workflows/{workflow}.yml").read_text())["jobs"].values()
        (python,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
        assert (python, job["env"]["PYTHON"]) == (expected, f"python{expected}")
        assert job.get("strategy", {"matrix": {"python": supported}})["matrix"]["python"] == supported
