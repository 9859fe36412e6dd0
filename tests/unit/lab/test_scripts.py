"""Take-home scripts as modules, and the exercises of the lesson that shows them."""

from pathlib import Path
from types import ModuleType

import psutil
import pytest

from tutorial_lib.lab import fsdp, scripts


def test_a_script_is_imported_by_its_name() -> None:
    from tutorial_lib.lab.scripts import train_fsdp

    assert train_fsdp.__file__ == str(scripts.DIRECTORY / "train_fsdp.py")
    assert callable(train_fsdp.train)


def test_an_unknown_script_names_those_that_are_there() -> None:
    with pytest.raises(AttributeError, match=r"no train_fspd\.py\. It has: hangs, "):
        scripts.train_fspd  # noqa: B018


def test_an_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    waiting = ModuleType("waiting")
    waiting.__file__ = str(tmp_path / "waiting.py")
    Path(waiting.__file__).write_text("import time\nprint('here', flush=True)\ntime.sleep(60)")

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scripts.torchrun(waiting, 2, on_line=interrupt)
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert [command for command in commands if waiting.__file__ in command] == []


def test_take_home_scripts_stay_short() -> None:
    assert {
        path.name: n for path in scripts.DIRECTORY.glob("*.py") if (n := len(path.read_text().splitlines())) >= 100
    } == {}


def test_exercises_accept_the_right_answer_and_explain_the_likely_wrong_one() -> None:
    held = fsdp.bytes_per_rank(7_000_000_000, 8)
    assert held.check(14).right is True
    assert held.check(112).right is False and "plain data parallelism" in held.check(112).reason
    sent = fsdp.bytes_between_nodes(8_000_000_000, 8)
    assert sent.check(2000).right is True and "inside the node" in sent.check(24_000).reason
    waits = fsdp.what_waits()
    assert waits.check("b").right is True and "different collectives" in waits.check("a").reason
    assert waits.check().right is None
