"""Makefile and continuous integration."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.unit.repository.files import ROOT

SUDO = """\
#!/bin/bash
# Like sudo -E: root gets another PATH, and the dynamic linker drops LD_LIBRARY_PATH.
[[ $1 == -E ]] && shift && exec env --unset LD_LIBRARY_PATH PATH=/usr/bin:/bin BY=root "$@"
"""


@pytest.mark.parametrize(
    ("workflow", "events", "target"),
    [
        ("ci", {"push", "pull_request"}, "test"),
        ("matrix", {"schedule", "workflow_dispatch"}, "matrix"),
    ],
)
def test_ci_sets_up_as_a_user_and_tests_as_root(
    clone: Path, tmp_path: Path, workflow: str, events: set[str], target: str
) -> None:
    stated = yaml.safe_load((ROOT / f".github/workflows/{workflow}.yml").read_text())
    assert set(stated[True]) == events  # YAML's `on`
    (job,) = stated["jobs"].values()
    sudo = tmp_path / "sudo"
    sudo.write_text(SUDO)
    sudo.chmod(0o755)
    (clone / "Makefile").write_text(
        "setup test matrix:\n\t@echo made $@, $$BY $$(command -v sudo) $$LD_LIBRARY_PATH $$CI\n"
    )
    kept = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LD_LIBRARY_PATH": "libraries", "CI": "true"}
    environment = {**os.environ, **kept, "BY": "runner"}
    made = [
        subprocess.check_output(["bash", "-ec", step["run"]], cwd=clone, env=environment, text=True)
        for step in job["steps"]
        if "run" in step
    ]
    assert made == [f"made setup, runner {sudo} libraries true\n", f"made {target}, root {sudo} libraries true\n"]


@pytest.mark.parametrize("script", ["run", "setup", "parts"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / script)], check=True)


def test_one_failing_part_fails_all_and_the_others_still_run(clone: Path) -> None:
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
