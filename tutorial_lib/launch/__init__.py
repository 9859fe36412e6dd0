"""Launchers: start the ranks of a run here or under Ray Train, or join the ranks that torchrun started.

All launchers call :func:`tutorial_lib.trainer.train` on every rank; they differ only in how the ranks start.
:func:`preflight` refuses a run that cannot work here, before any process starts.

Importing this package is quick, so that :func:`warm_up` can start its server first and load torch at the same time as
the caller. The modules below therefore import anything that needs torch inside functions.
"""

from tutorial_lib.launch.checks import preflight
from tutorial_lib.launch.errors import WorkerError
from tutorial_lib.launch.own_loop import run_loop
from tutorial_lib.launch.runs import Interrupted, Run, reshape, run, run_all, warm_up
from tutorial_lib.launch.watch import OnRows

__all__ = [
    "Interrupted",
    "OnRows",
    "Run",
    "WorkerError",
    "preflight",
    "reshape",
    "run",
    "run_all",
    "run_loop",
    "warm_up",
]
