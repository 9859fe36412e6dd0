"""Progress of a run: a log, a line in a terminal or a live curve."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest

from tutorial_lib.lab.progress import LiveCurve, Progress, duration, progress


def metrics(steps: int, start: int = 1) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 6 - step / 100, "tokens": 1000, "seconds": 0.5} for step in range(start, start + steps)
    ]


def test_a_log_gets_a_line_now_and_then_and_the_last_step() -> None:
    out = io.StringIO()
    with Progress(40, title="ZeRO-3", interval=3600, file=out) as shown:
        shown.on_rows(metrics(10))
        shown.on_rows([])
        shown.on_rows(metrics(5, start=11))
    shown.close()
    started, last = out.getvalue().splitlines()
    assert started == "ZeRO-3: starting processes ..."
    assert last == "ZeRO-3: step 15 of 40, loss 5.8500, 2000 tokens/s; about 12 s left"
    out = io.StringIO()
    with Progress(None, interval=0, file=out) as shown:
        shown.on_rows(metrics(10))
        time.sleep(0.001)
        shown.on_rows(metrics(5, start=11))
    assert out.getvalue().splitlines()[1:] == [
        "training: step 10, loss 5.9000, 2000 tokens/s",
        "training: step 15, loss 5.8500, 2000 tokens/s",
    ]


def test_rows_of_a_step_and_a_loss_are_enough() -> None:
    out = io.StringIO()
    with Progress(3, interval=0, file=out) as shown:
        shown.on_rows([{"step": 1, "loss": 2.5}])
    assert out.getvalue().splitlines()[1:] == ["training: step 1 of 3, loss 2.5000"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminals_line_is_rewritten_and_the_last_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with Progress(40, title="resumed", file=out) as shown:
        shown.on_rows(metrics(10, start=21))
        shown.on_rows(metrics(10, start=31))
    lines = out.getvalue().split("\r\x1b[K")
    assert lines[1] == "resumed: starting processes ..."
    assert "resumed: step 30 of 40, loss 5.7000, 2000 tokens/s; about 5 s left" in lines
    assert lines[-1] == "resumed: step 40 of 40, loss 5.6000, 2000 tokens/s\n"


def test_a_line_that_is_rewritten_is_cut_to_the_terminals_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    out = Terminal()
    with Progress(40, title="resumed", file=out) as shown:
        shown.on_rows(metrics(10, start=31))
    *rewritten, last = out.getvalue().split("\r\x1b[K")
    assert max(map(len, rewritten)) == 29
    assert last == "resumed: step 40 of 40, loss 5.6000, 2000 tokens/s\n"


def test_a_terminal_shows_that_no_step_was_left() -> None:
    out = Terminal()
    with Progress(40, title="again", file=out):
        pass
    assert out.getvalue().endswith("again: no step was left to train\n")


def test_several_runs_in_a_row_are_distinguished() -> None:
    out = io.StringIO()
    with Progress(10, title="t", labels=["stage 0", "stage 1", "stage 2"], interval=3600, file=out) as shown:
        shown.on_rows(metrics(10))
        shown.on_rows(metrics(10) + metrics(4))
    assert [len(rows) for rows in shown.runs] == [10, 10, 4]
    assert out.getvalue() == (
        "t: starting processes ...\nrun 3 of 3, stage 2: step 4 of 10, loss 5.9600, 2000 tokens/s; about 3 s left\n"
    )


def test_without_rows_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (Progress(5), LiveCurve(5)):
        shown.close()
    assert capsys.readouterr() == ("", "")


def test_a_log_is_chosen_where_no_one_watches(capsys: pytest.CaptureFixture[str]) -> None:
    assert type(progress(10)) is Progress


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (150, "2 min"), (7200, "2.0 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
