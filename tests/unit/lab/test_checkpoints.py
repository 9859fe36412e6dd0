"""Lesson 04's helpers, and its exercises, which accept the right answer and explain wrong ones."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest

from tests.support.exercise_assertions import assert_explains
from tutorial_lib.config import ConfigError
from tutorial_lib.lab import checkpoints

EXERCISES = {
    "lost": (checkpoints.what_was_lost(), "random states", {"weights": "untrained", "optimizer": "before the first"}),
    "interval": (
        checkpoints.minutes_between_saves(60, 7),
        142,
        {100.4: "2 under the square root", 8519: "seconds", 2.37: "hours", 500: "too high"},
    ),
    "read": (checkpoints.terabytes_read(405e9, 128), 622, {4.86: "once", 829: "12 bytes, not 16", 100: "too low"}),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_is_accepted_and_wrong_ones_are_explained(name: str) -> None:
    assert_explains(*EXERCISES[name])


def test_a_copied_model_has_the_changes_and_no_weights(tmp_path: Path) -> None:
    model = Path(checkpoints.copy_model("embedded/gpt2", tmp_path / "model", resid_pdrop=0.1))
    assert json.loads((model / "config.json").read_text())["resid_pdrop"] == 0.1
    assert (model / "tokenizer.json").is_file()
    assert list(model.glob("*.safetensors")) == []
    with pytest.raises(ConfigError, match=r"has no dropuot in its config\.json"):
        checkpoints.copy_model("embedded/gpt2", tmp_path / "model", dropuot=0.1)


@pytest.mark.parametrize("family", ["qwen2", "bloom"])
def test_a_model_without_the_keys_is_refused_with_one_that_has_them(family: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^embedded/{family} has no n_embd, .*Choose a model.*embedded/gpt2"):
        checkpoints.copy_model(f"embedded/{family}", tmp_path / "model", n_embd=512, resid_pdrop=0.1)


def test_steps_without_a_checkpoint_at_each_quarter_are_refused() -> None:
    """With 10 steps the lesson saves every second one, and neither a half nor three quarters of them is saved."""
    for steps in (8, 12, 20):
        checkpoints.check_steps(steps)
    for steps, instead in {10: 8, 23: 20, 4: 8, 0: 8}.items():
        with pytest.raises(ConfigError, match=f"STEPS = {steps}: .* such as STEPS = {instead}"):
            checkpoints.check_steps(steps)


def test_the_youngest_process_is_killed_as_soon_as_the_condition_holds(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with checkpoints.kill_a_worker(when=(tmp_path / "saved").exists), subprocess.Popen(sleep) as older:
        time.sleep(0.05)  # process start times have a resolution of 10 ms
        with subprocess.Popen(sleep) as younger:
            assert psutil.Process(younger.pid).is_running() and older.poll() is None
            (tmp_path / "saved").touch()
            assert younger.wait(10) == -signal.SIGKILL
        assert older.poll() is None
        older.kill()


def test_no_process_is_killed_if_the_condition_never_holds() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with checkpoints.kill_a_worker(when=lambda: False):
            pass
        assert process.poll() is None
        process.kill()


def test_quiet_drops_output_only_inside_its_block(capfd: pytest.CaptureFixture[str]) -> None:
    with checkpoints.quiet():
        print("from Python", flush=True)
        subprocess.run(["echo", "from below"], check=True)
        warnings.warn("a warning", stacklevel=1)
    subprocess.run(["echo", "after"], check=True)
    assert capfd.readouterr() == ("after\n", "")


def test_losses_are_read_from_a_log_among_other_lines(tmp_path: Path) -> None:
    log = tmp_path / "rank-000.log"
    assert checkpoints.losses_in_log(log) == {}
    log.write_text("a warning\nstep    1  loss 7.5000000\nstep    2  loss 7.25\nstep    3  lo")
    assert checkpoints.losses_in_log(log) == {1: 7.5, 2: 7.25}
