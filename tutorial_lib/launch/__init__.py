"""Launchers: start the ranks of a run here, under Ray Train, or as one that somebody else starts (torchrun, srun).

All launchers call :func:`tutorial_lib.trainer.train` on every rank and differ in nothing else. What can be refused is
refused by :func:`preflight`, before any process starts.

Importing this package is quick, so that :func:`warm_up` can start its server first and load torch at the same time as
the caller. Its pages therefore import inside functions whatever needs torch.
"""

from tutorial_lib.launch.checks import preflight
from tutorial_lib.launch.errors import WorkerError
from tutorial_lib.launch.loops import run_loop
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
