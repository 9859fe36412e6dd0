"""Helpers and exercises of lesson 04: check its steps, copy a model, kill a worker, silence libraries, read a log."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import psutil

from tutorial_lib.config import ConfigError
from tutorial_lib.lab.exercises import Exercise, choice, number
from tutorial_lib.models.loading import resolve_model

_POLL_SECONDS = 0.01


def check_steps(steps: int) -> None:
    """Refuse a number of steps with which the lesson would not save where it looks for a checkpoint.

    Args:
        steps: the lesson's ``STEPS``.

    Raises:
        ConfigError: says what to write instead.
    """
    if steps % 4 or steps < 8:
        raise ConfigError(
            f"STEPS = {steps}: this lesson saves four times, stops after half of the steps, and kills a worker two "
            f"steps later. Write a multiple of 4 from 8 on, such as STEPS = {max(8, steps // 4 * 4)}."
        )


def copy_model(name: str, directory: Path, **changes: Any) -> str:
    """Copy a model without its weights, with changes to its configuration, for training from random weights.

    Args:
        name: hub name, directory or embedded model.
        directory: directory of the copy; anything in it is replaced.
        **changes: keys of its ``config.json``.

    Returns:
        The copy's path, which is also its model name.

    Raises:
        ConfigError: the model has no such keys.
    """
    shutil.rmtree(directory, ignore_errors=True)
    weights = shutil.ignore_patterns("*.safetensors*", "*.bin*")
    shutil.copytree(resolve_model(name), directory, ignore=weights)
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if unknown := changes.keys() - config.keys():
        raise ConfigError(
            f"{name} has no {', '.join(sorted(unknown))} in its config.json. Choose a model that has these keys, "
            "as the family of embedded/gpt2 does, or change others."
        )
    file.write_text(json.dumps(config | changes), encoding="utf-8")
    return str(directory)


@contextmanager
def kill_a_worker(*, when: Callable[[], bool]) -> Iterator[None]:
    """Send SIGKILL to the youngest of this process's workers as soon as a condition holds.

    Args:
        when: function that returns whether the condition holds; called a hundred times per second.
    """
    ended = threading.Event()

    def kill() -> None:
        while not when():
            if ended.wait(_POLL_SECONDS):
                return
        max(psutil.Process().children(recursive=True), key=lambda process: process.create_time()).kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and the output of libraries, from Python and from C++: DeepSpeed prints a lot."""
    kept = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            for number, original in zip((1, 2), kept, strict=True):
                os.dup2(original, number)
                os.close(original)


def losses_in_log(log: Path) -> dict[int, float]:
    """Return the losses that a loop has logged so far, by step; empty if there is no log yet."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    found = re.findall(r"^step +(\d+)  loss (\S+)$", text, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def what_was_lost() -> Exercise:
    """Ask which part of a checkpoint was missing."""
    return Exercise(
        "A colleague's run has dropout. After a resume, its very first loss is already a little off, and so are all "
        "later ones. With dropout switched off, the same resume matches to the last digit. What was not saved? Answer "
        "`weights`, `optimizer`, `position` or `random states`.",
        check=choice(
            "random states",
            near={
                "weights": "Then the first loss would be an untrained model's.",
                "optimizer": "The first loss is computed before the first update, so it would be right.",
                "position": "Then it would not match without dropout, either.",
            },
        ),
        hints=["What does a run without dropout not need?", "Where do dropout masks come from?"],
        solution="The random states of the ranks. Without them every rank drew different dropout masks from the first "
        "step on.",
    )


def minutes_between_saves(save_seconds: float, days_between_failures: float) -> Exercise:
    """Ask for Young's interval."""
    mean = days_between_failures * 86_400
    best = math.sqrt(2 * save_seconds * mean) / 60
    return Exercise(
        f"Your job fails once in {days_between_failures:g} days, and training stalls for {save_seconds:g} "
        "seconds per save. How many minutes of training should lie between two saves?",
        check=number(
            best,
            relative=0.05,
            unit="minutes",
            near={
                math.sqrt(save_seconds * mean) / 60: "Close: there is a 2 under the square root.",
                60 * best: "Those are seconds.",
                best / 60: "Those are hours.",
            },
        ),
        hints=["Young: the square root of 2 C M.", "Both C and M in seconds, then divide by 60."],
        solution=f"sqrt(2 x {save_seconds:g} s x {mean:,.0f} s) = {60 * best:,.0f} s, or {best:.0f} minutes. The "
        "minimum is flat, so any round number near it will do.",
    )


def terabytes_read(num_params: float, num_ranks: int) -> Exercise:
    """Ask how much a reshape reads if every rank reads everything."""
    checkpoint = 12 * num_params
    return Exercise(
        f"A checkpoint of {num_params / 1e9:g} billion parameters holds 12 bytes for each: the fp32 weight and Adam's "
        f"two moments. {num_ranks} ranks resume it in a new shape, and each reads every tensor in full. How many TB "
        "do they read in all?",
        check=number(
            checkpoint * num_ranks / 1e12,
            relative=0.02,
            unit="TB",
            near={
                checkpoint / 1e12: "That is the checkpoint once, which is what DCP reads.",
                16 * num_params * num_ranks / 1e12: "Gradients are not saved: 12 bytes, not 16.",
            },
        ),
        hints=["First the size of the checkpoint. Then: who reads it?"],
        solution=f"12 x {num_params / 1e9:g} billion = {checkpoint / 1e9:,.0f} GB, times {num_ranks}: "
        f"{checkpoint * num_ranks / 1e12:.1f} TB. With DCP it is {checkpoint / 1e12:g} TB, since each rank reads its "
        "own share.",
    )
