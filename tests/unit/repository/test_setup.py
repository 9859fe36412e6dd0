"""Set-up: the calls that run it, and its messages on a machine that lacks something."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import psutil
import pytest

from tests.unit.repository.files import pins


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


def test_a_named_python_is_checked_again(clone: Path) -> None:
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
    (tools / "apt-get").symlink_to("/bin/false")  # makes every machine look like Debian
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
def test_missing_tools_are_named_in_one_line_with_the_install_command(
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
    """Return the set-up script with a last line that calls the function named in its arguments."""
    script = clone / ".ci" / "functions"
    script.write_text((clone / ".ci" / "setup").read_text().removesuffix("main\n") + '"$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("signal", [SIGINT, SIGTERM])
def test_processes_that_a_step_started_end_with_it(clone: Path, signal: Signals) -> None:
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


def test_a_step_shows_its_own_notices_even_with_a_long_log(clone: Path) -> None:
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
def test_cuda_is_downloaded_for_a_gpu_or_with_a_warning(
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
