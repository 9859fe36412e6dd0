"""Progress of a run: a log, a bar or a live curve."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest

from tutorial_lib.lab.progress import LiveCurve, LogLines, TerminalBar, progress


def metrics(steps: int, start: int = 1) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 6 - step / 100, "tokens": 1000, "seconds": 0.5} for step in range(start, start + steps)
    ]


def test_a_log_gets_a_line_now_and_then_and_the_last_step() -> None:
    out = io.StringIO()
    with LogLines(40, title="ZeRO-3", interval=3600, file=out) as shown:
        shown.on_rows(metrics(10))
        shown.on_rows([])
        shown.on_rows(metrics(5, start=11))
    shown.close()
    started, last = out.getvalue().splitlines()
    assert started == "ZeRO-3: starting processes ..."
    assert last == "ZeRO-3: step 15 of 40, loss 5.8500, 2000 tokens/s"
    out = io.StringIO()
    with LogLines(None, interval=0, file=out) as shown:
        shown.on_rows(metrics(10))
        time.sleep(0.001)
        shown.on_rows(metrics(5, start=11))
    assert out.getvalue().splitlines()[1:] == [
        "training: step 10, loss 5.9000, 2000 tokens/s",
        "training: step 15, loss 5.8500, 2000 tokens/s",
    ]


def test_a_bar_counts_steps_from_where_a_run_resumed() -> None:
    out = io.StringIO()
    with TerminalBar(40, title="resumed", file=out) as shown:
        shown.on_rows(metrics(10, start=21))
        shown.on_rows(metrics(10, start=31))
    last = out.getvalue().split("\r")[-1]
    assert "resumed: 100%" in last and "40/40" in last and "loss=5.6000" in last and "tokens_per_s=2000" in last


def test_several_runs_in_a_row_are_told_apart() -> None:
    out = io.StringIO()
    with LogLines(10, title="t", labels=["stage 0", "stage 1"], interval=3600, file=out) as shown:
        shown.on_rows(metrics(10))
        shown.on_rows(metrics(10) + metrics(4))
    assert [len(rows) for rows in shown.runs] == [10, 10, 4]
    assert out.getvalue() == "t: starting processes ...\nt 3: step 4 of 10, loss 5.9600, 2000 tokens/s\n"


def test_without_rows_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (LogLines(5), LiveCurve(5)):
        shown.close()
    assert capsys.readouterr() == ("", "")


def test_a_log_is_chosen_where_no_one_watches(capsys: pytest.CaptureFixture[str]) -> None:
    assert type(progress(10)) is LogLines
