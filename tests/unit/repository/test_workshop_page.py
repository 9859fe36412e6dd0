"""docs/workshop.md: every link, setting, row and file that it names exists."""

from __future__ import annotations

import re

import pytest

from tests.unit.repository.files import ROOT
from tutorial_lib import cli
from tutorial_lib.bench.experiments import rows_of
from tutorial_lib.config import Config
from tutorial_lib.config.workshop import parse_experiment
from tutorial_lib.engine.deepspeed.file import DIRECTORY

PAGE = (ROOT / "docs" / "workshop.md").read_text()
CODE = " ".join(re.findall(r"`([^`]+)`", PAGE))


def test_every_link_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if "://" not in link]
    assert len(links) >= 3 and all((ROOT / "docs" / link).exists() for link in links)


def test_every_setting_exists(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ""
    for command in (["train"], ["bench", "offload"], ["slurm"]):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        shown += capsys.readouterr().out
    flags = set(re.findall(r"--[a-z][a-z-]+", CODE))
    assert len(flags) > 10 and not {flag for flag in flags if f"{flag} " not in shown and f"{flag}\n" not in shown}


def test_every_row_and_file_exists() -> None:
    commands = re.findall(r"bench ([a-z-]+)[^`]*--rows ([\w -]+?) \.\.\.", PAGE)
    assert len(commands) == 3
    for experiment, rows in commands:
        assert rows_of(experiment, Config.create("gpu"), rows.split())
    names = re.findall(r"[0-3]ZO?P?-\dG\dN", PAGE)
    assert len(names) > 8 and all(parse_experiment(name) for name in names)
    for name in re.findall(r"--deepspeed (?:ds_configs/)?(\w+)", PAGE):
        assert (DIRECTORY / f"{name}.json").exists()
