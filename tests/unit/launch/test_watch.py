"""Watcher of a launch: the rows it hands on, and the signals it turns into stop requests."""

from __future__ import annotations

import signal

import pytest

from tutorial_lib.launch import watch
from tutorial_lib.records import Row, RunDirectory


def test_rows_of_a_killed_start_are_not_handed_on(run: RunDirectory) -> None:
    """They are still there at the first polls, until the ranks delete them and write them again."""
    for step in (1, 2, 3):
        run.append({"step": step, "loss": 9.0})
    seen: list[Row] = []
    watched = watch.Watcher([run], seen.extend, [])
    watched.poll()
    assert seen == []
    run.keep_rows_until(0)
    for step in (1, 2, 3):
        run.append({"step": step, "loss": 1.0})
    watched.poll()
    assert [row["loss"] for row in seen] == [1.0, 1.0, 1.0]


def test_a_signal_while_the_handlers_are_installed_asks_the_run_to_stop(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in watch.SIGNALS]
    install, signals = signal.signal, list[int]()

    def interrupted(number: int, handler: object) -> object:
        replaced = install(number, handler)
        if not signals:
            signal.raise_signal(number)
        return replaced

    monkeypatch.setattr(signal, "signal", interrupted)
    with watch.stop_on_signal(watch.Watcher([run], None, signals)):
        assert signals == [watch.SIGNALS[0]] and run.stop_file.exists()
    assert [signal.getsignal(number) for number in watch.SIGNALS] == before
