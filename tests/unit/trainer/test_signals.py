"""Signals that ask a rank to stop, and the file for its output."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tutorial_lib.trainer.signals import output_to, stop_signals


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_usr1_is_heeded_although_torchrun_was_started_with_it_ignored() -> None:
    """Batch scripts ignore USR1, because it would kill torchrun, and the ranks inherit that."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with stop_signals() as stop_signalled:
        assert stop_signalled() == 0
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)  # it may come more than once
        assert stop_signalled() == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_an_interrupt_that_a_shell_ignores_in_the_background_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_signals() as stop_signalled:
        signal.raise_signal(signal.SIGINT)
        assert stop_signalled() == 0


def test_a_line_goes_where_it_was_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Python holds back up to 8 KB of what a process prints into a file."""
    log = tmp_path / "log"
    with open(1, "w", closefd=False) as stdout, redirect_stdout(stdout):
        print("before")
        with output_to(log):
            print("within")
        print("after")
    assert log.read_text() == "within\n"
    assert capfd.readouterr().out == "before\nafter\n"


def test_a_log_that_cannot_be_opened_leaves_no_open_files(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(IsADirectoryError), output_to(tmp_path):
        pass
    assert os.listdir("/proc/self/fd") == before
