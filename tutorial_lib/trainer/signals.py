"""Process of one rank: the signals that ask it to stop, and the file for its output.

A signal is only recorded here. After each step the ranks agree whether to stop (:mod:`tutorial_lib.trainer.stops`), and
the loop saves and ends (:mod:`tutorial_lib.trainer.loop`). ``launch.watch`` handles signals to the launching process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tutorial_lib.records import STOPPING_MESSAGE


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of the first SIGTERM, SIGUSR1 or SIGINT, or 0 if none has come.

    A second SIGINT is not recorded: it interrupts at once.
    """
    seen: list[int] = []
    announced: list[int] = []

    def keep(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and number in seen:
            raise KeyboardInterrupt
        seen.append(number)

    def stop_signalled() -> int:
        if signal.SIGINT in seen and not announced:
            announced.append(signal.SIGINT)
            print(STOPPING_MESSAGE, file=sys.stderr, flush=True)
        return seen[0] if seen else 0

    if threading.current_thread() is not threading.main_thread():
        # Ray calls the training function in a thread, where signals do not arrive. There the stop file replaces them.
        yield lambda: 0
        return
    # Ignored signals stay ignored, such as SIGINT for a shell's background jobs. SIGUSR1 is the exception: batch
    # scripts ignore it because it would kill torchrun, and the ranks inherit that, although they should receive it.
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handled = [n for n in numbers if n == signal.SIGUSR1 or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, keep) for number in handled}
    try:
        yield stop_signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def output_to(path: Path | None) -> Iterator[None]:
    """Redirect this process's output to a file at the level of file descriptors, to include output from C++."""
    if path is None:
        yield
        return
    with path.open("ab", buffering=0) as file:
        os.utime(path)  # shows the launcher that this process is alive, even if this process writes nothing
        kept = [os.dup(1), os.dup(2)]
        _flush_output()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            _flush_output()
            for number, original in zip((1, 2), kept, strict=True):
                os.dup2(original, number)
                os.close(original)


def _flush_output() -> None:
    """Write the part of this process's output that Python still buffers."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as in a process that was started without output
            with suppress(OSError):  # on a full disk it stays in memory
                stream.flush()
