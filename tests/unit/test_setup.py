"""Set-up: several files agree on packages, versions, Pythons and import borders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BROUGHT_BY_TORCH = re.compile(r"(nvidia|cuda)-|(triton|cupy|pytorch-triton)")
NOT_CUDA = {"nvidia-ml-py"}  # asks the driver through a library that comes with it; plain Python, also without a GPU


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def wanted() -> list[Requirement]:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


# --- the pins ---------------------------------------------------------------------------------------------------------


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


def test_everything_wanted_is_pinned_and_versions_stand_in_constraints_alone() -> None:
    assert [r.name for r in wanted() if canonicalize_name(r.name) not in pins()] == []
    assert [str(r) for r in wanted() if r.specifier] == []


def test_the_pins_are_closed_and_installed() -> None:
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
    assert len(installed) > 100  # the walk did walk


# --- the other files --------------------------------------------------------------------------------------------------


def test_conda_and_binder_get_the_same_packages_on_the_same_python() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    assert pip == ["-c constraints.txt", "-e .[dev]"]
    assert [line for line in plain if "=" in line] == [f"python{PROJECT['project']['requires-python']}"]
    assert "pip" in plain


def test_the_same_pythons_everywhere() -> None:
    """The tools check against the oldest; continuous integration runs the oldest and the newest."""
    pythons = SpecifierSet(PROJECT["project"]["requires-python"])
    assert [minor for minor in range(8, 20) if pythons.contains(f"3.{minor}.0")] == [11, 12, 13]
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert PROJECT["tool"]["mypy"]["python_version"] == "3.11"
    for workflow, expected in (("ci", "${{ matrix.python }}"), ("matrix", "3.13")):
        (job,) = yaml.safe_load((ROOT / f".github/workflows/{workflow}.yml").read_text())["jobs"].values()
        (python,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
        assert (python, job["env"]["PYTHON"]) == (expected, f"python{expected}")
        assert job.get("strategy", {"matrix": {"python": ["3.11", "3.13"]}})["matrix"]["python"] == ["3.11", "3.13"]


@pytest.mark.parametrize(
    ("workflow", "events", "runs", "target"),
    [
        ("ci", {"push", "pull_request"}, ".ci/run", "test"),
        ("matrix", {"schedule", "workflow_dispatch"}, ".ci/run matrix", "matrix"),
    ],
)
def test_ci_runs_make(clone: Path, workflow: str, events: set[str], runs: str, target: str) -> None:
    stated = yaml.safe_load((ROOT / f".github/workflows/{workflow}.yml").read_text())
    assert set(stated[True]) == events  # YAML's `on`
    (job,) = stated["jobs"].values()
    assert runs in [step.get("run") for step in job["steps"]]
    (clone / "Makefile").write_text("test matrix:\n\t@echo made $@\n")
    assert subprocess.check_output(runs.split(), cwd=clone, text=True) == f"made {target}\n"


@pytest.mark.parametrize("script", ["run", "setup", "parts"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / script)], check=True)


def test_one_failing_part_fails_the_whole_and_the_others_still_run(clone: Path) -> None:
    recipes = 'unit:\n\t@echo "== 3 passed in 1.50s =="\nbad:\n\t@echo "== 1 failed, 2 passed in 2s =="; exit 1\n'
    (clone / "Makefile").write_text(recipes)
    run = subprocess.run([".ci/parts", "unit", "bad", "unit"], cwd=clone, capture_output=True, text=True)
    *_, total, first, second, third = run.stdout.splitlines()
    match = re.fullmatch(r"unit +passed +\d s of +(\d+) +3 passed in 1.50s *", first)
    assert match
    assert re.fullmatch(r"bad +FAILED +\d s of    0 +1 failed, 2 passed in 2s *", second)
    assert (third.split()[:2], run.returncode) == (["unit", "passed"], 1)
    assert re.fullmatch(rf"### \d s of {2 * int(match[1])} in all", total)
    assert subprocess.run([".ci/parts", "unit"], cwd=clone, capture_output=True).returncode == 0


def test_a_part_over_its_budget_is_marked_and_not_failed(clone: Path) -> None:
    (clone / "Makefile").write_text("unit:\n\t@sleep 1.1\n")
    parts = clone / ".ci" / "parts"
    text, changed = re.subn(r"\[unit\]=\d+", "[unit]=1", parts.read_text())
    assert changed == 1
    parts.write_text(text.replace("took > budget", "took >= budget"))
    run = subprocess.run([parts, "unit"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"unit +passed +[12] s of    1  OVER ITS BUDGET *", run.stdout.splitlines()[-1])


def test_help_is_the_default_and_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"\.PHONY: (help(?:.|\\\n)*)\n\n", text).group(1).replace("\\\n", " ").split())  # type: ignore[union-attr]
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()[1:]} == targets
    assert {"run-notebooks", "test", "lab", "nbval", "lint", "bench", "images", "clean"} <= targets


# --- set-up itself ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a checkout without an environment, in a directory whose name has a space."""
    directory = tmp_path / "a clone"
    directory.mkdir()
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, directory)
    shutil.copytree(ROOT / ".ci", directory / ".ci")
    return directory


def would_run(directory: Path, *words: str) -> str:
    return subprocess.run(
        ["make", "-n", *(words or ["setup"])], cwd=directory, capture_output=True, text=True, check=True
    ).stdout


def mark_ready(directory: Path, made_in: Path) -> None:
    (directory / ".venv").mkdir()
    (directory / ".venv" / "ready").write_text(f"{made_in}\n")


def test_a_fresh_clone_is_set_up_by_both_commands(clone: Path) -> None:
    assert ".ci/setup" in would_run(clone, "run-notebooks")
    assert ".ci/setup" in would_run(clone, "test")


def test_a_second_call_does_no_set_up(clone: Path) -> None:
    mark_ready(clone, made_in=clone)
    assert ".ci/setup" not in would_run(clone, "run-notebooks")


def test_a_python_that_is_named_is_looked_at_again(clone: Path) -> None:
    mark_ready(clone, made_in=clone)
    assert ".ci/setup" in would_run(clone, "setup", "PYTHON=python3.12")


@pytest.mark.parametrize("changed", ["constraints.txt", "pyproject.toml"])
def test_a_changed_pin_sets_up_again(clone: Path, changed: str) -> None:
    mark_ready(clone, made_in=clone)
    later = (clone / ".venv" / "ready").stat().st_mtime + 10
    os.utime(clone / changed, (later, later))
    assert ".ci/setup" in would_run(clone)


def test_a_moved_directory_sets_up_again(clone: Path) -> None:
    mark_ready(clone, made_in=clone.parent / "elsewhere")
    assert ".ci/setup" in would_run(clone)


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """Return a PATH with the shell's tools, but neither a Python nor a compiler."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "mkdir", "cat", "rm", "sed", "tail"):
        (tools / name).symlink_to(shutil.which(name))  # type: ignore[arg-type]
    (tools / "apt-get").symlink_to("/bin/false")  # a Debian, wherever this runs
    return tools


def fake(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(
    "pythons, named",
    [
        ({}, "(there is no python3). Install it with: sudo apt-get install python3 python3-venv python3-dev"),
        ({"python3": "3.11 is 3.10.12"}, "(python3 is 3.10.12). Install it with: sudo apt-get install python3.11 "),
        ({"python3": "3.13 is 3.14.0"}, "(python3 is 3.14.0). Install it with: sudo apt-get install python3.13 "),
        ({"python3": "3.12 is there, but without its venv module"}, "sudo apt-get install python3.12 python3.12-venv "),
        ({"python3.13": "3.13 is there, but without its C headers", "python3": "3.11 is 3.9.2"}, "python3.13-dev"),
        ({"python3.13": "3.11 is 3.9.2", "python3": "3.12 is there, but without its C headers"}, "python3.12-dev"),
        (
            {"python3.13": "3.13 is there, but without its venv module", "python3.11": "usable"},
            "A C++ compiler is missing",
        ),
        ({"python3": "usable"}, "A C++ compiler is missing (g++ is not there)"),
    ],
)
def test_what_is_missing_is_named_in_one_line_with_its_command(
    clone: Path, bare_path: Path, pythons: dict[str, str], named: str
) -> None:
    for name, answer in pythons.items():
        fake(bare_path, name, f"echo '{answer}'")
    run = subprocess.run(
        [".ci/setup"], cwd=clone, env={"PATH": str(bare_path), "HOME": str(clone)}, capture_output=True, text=True
    )
    (line,) = run.stderr.splitlines()
    assert named in line
    assert run.returncode == 2
    assert not (clone / ".venv").exists()


def functions(clone: Path) -> Path:
    """Return the set-up script without its last line, so that it calls a given function."""
    script = clone / ".ci" / "functions"
    script.write_text((clone / ".ci" / "setup").read_text().removesuffix("main\n") + '"$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("signal", [SIGINT, SIGTERM])
def test_what_a_step_started_ends_with_it(clone: Path, signal: Signals) -> None:
    command = [functions(clone), "step", "1", "wait", "bash", "-c", "echo $$; sleep 100; true"]
    run = subprocess.Popen(command, start_new_session=True)
    log = clone / "build" / "setup.log"
    until = time.monotonic() + 30
    while not (log.exists() and log.read_text().split()[-1].isdigit()):
        assert time.monotonic() < until
        time.sleep(0.05)
    started = psutil.Process(int(log.read_text().split()[-1]))
    family = [started, *started.children()]
    os.killpg(run.pid, signal)  # as a terminal does
    assert run.wait(10) != 0
    assert psutil.wait_procs(family, 10)[1] == []


def test_a_step_tells_its_own_notices_however_long_its_log(clone: Path) -> None:
    (clone / "build").mkdir()
    (clone / "build" / "setup.log").write_text("NOTICE: of an earlier step\n")
    script = "echo NOTICE: news; yes | head -n 100000"
    told = call(clone, "step", "1", "wait", "bash", "-c", script, PATH=os.environ["PATH"])
    assert [line.strip() for line in told.splitlines()] == ["set-up 1/5: wait", "news"]


def call(clone: Path, *words: str, **environment: str) -> str:
    """Call one function of the set-up script and return what it prints."""
    run = subprocess.run([functions(clone), *words], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


HELD = f"torch=={pins()['torch']}"
CUDA = "printf ' + %s\\n' torch==2.13.0 nvidia-cublas==13.1.1.3"


@pytest.mark.parametrize(
    "given, gpus, from_pytorch, from_the_index, backend, said",
    [
        ("", "GPU 0: NVIDIA H100", "true", CUDA, "", "torch with CUDA, because there is a GPU"),
        ("", "", "true", CUDA, "cpu", "torch's CPU build from PyTorch, because there is no GPU"),
        ("", "", "false", CUDA, "", "torch with CUDA (about 3 GB to download), although there is no GPU"),
        ("", "", "false", "echo ' + torch==2.13.0+cpu'", "", "torch 2.13.0+cpu, which is what the package index has"),
        ("cu130", "", "true", CUDA, "cu130", "torch for cu130, as UV_TORCH_BACKEND says"),
        ("", "", "true", f"case $2 in freeze) echo {HELD}+cpu;; esac", "", f"{HELD}+cpu is there already"),
    ],
)
def test_cuda_is_downloaded_for_a_gpu_or_with_a_word(
    clone: Path, tmp_path: Path, given: str, gpus: str, from_pytorch: str, from_the_index: str, backend: str, said: str
) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)
    answers = f'case "$*" in *--torch-backend*) {from_pytorch};; *) {from_the_index};; esac'
    fake(clone / ".venv" / "bin", "uv", answers)
    fake(tmp_path, "nvidia-smi", f"echo '{gpus}'")
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert f"NOTICE: {said}" in call(clone, "choose_torch", PATH=path, UV_TORCH_BACKEND=given)
    assert (clone / "build" / "torch-backend").read_text().strip() == backend


def test_uv_takes_packages_from_where_pip_does(clone: Path, tmp_path: Path) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)
    fake(clone / ".venv" / "bin", "python", f'exec "{sys.executable}" "$@"')
    configuration = tmp_path / "pip.conf"
    configuration.write_text(
        "[global]\nindex-url = file:///a\nfind-links =\n  /b\n  /c\n[install]\nindex-url = file:///d\n"
    )
    printed = call(
        clone, "pips_settings_for_uv", PATH=os.environ["PATH"], HOME=str(tmp_path),
        PIP_CONFIG_FILE=str(configuration), PIP_EXTRA_INDEX_URL="file:///e file:///f",
        ALL_PROXY="mine", PIP_PROXY="pips",
    )  # fmt: skip
    assert {
        "export UV_DEFAULT_INDEX=file:///d",
        "export UV_INDEX='file:///e file:///f'",
        "export UV_FIND_LINKS=/b,/c",
        "export ALL_PROXY=mine",
    } <= set(printed.splitlines())


# --- the borders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, forbidden, contract",
    [
        ("config/__init__", "from tutorial_lib import records", "config knows nobody"),
        ("theory/memory", "import torch", "theory is arithmetic"),
        ("theory/memory", "from tutorial_lib import config", "theory is arithmetic"),
        ("trainer/loop", "import deepspeed", "only engine.deepspeed and checkpoint.formats"),
        ("models/loading", "import ray", "only launch.ray imports Ray"),
        ("records", "from tutorial_lib.launch import local", "nobody knows launch"),
        ("lab/claims", "from tutorial_lib import trainer", "lab reads records and theory"),
        ("models/loading", "from tutorial_lib import trainer", "data flows one way"),
    ],
)
def test_a_crossed_border_is_seen(tmp_path: Path, module: str, forbidden: str, contract: str) -> None:
    """`make lint` checks the borders; this breaks each contract once, to show that the check still works."""
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json")
    shutil.copytree(ROOT / "tutorial_lib", tmp_path / "tutorial_lib", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "tutorial_lib" / f"{module}.py").open("a") as file:
        file.write(f"\n{forbidden}\n")
    lint = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    run = subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, NO_COLOR="1"))
    broken = [line for line in run.stdout.splitlines() if line.endswith("BROKEN")]
    assert run.returncode == 1
    assert any(line.startswith(contract) for line in broken)
