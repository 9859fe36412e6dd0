"""Failures of a row by kind, for the table: out of memory, killed, refused before it started, or another error."""

from __future__ import annotations

import re
from pathlib import Path

from tutorial_lib.bench.record import FAILED, KILLED, OUT_OF_MEMORY, REFUSED
from tutorial_lib.config import ConfigError

_NO_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|failed with MemoryError|can(no|')t allocate memory", re.IGNORECASE
)
_KILLED = re.compile(r"exit code -9\b|SIGKILL|it was killed")


def explain(error: Exception, oom_kills: int) -> tuple[str, str]:
    """Return a failed row's status and its cause in one line.

    Args:
        error: the exception that running it raised.
        oom_kills: number of processes that the kernel killed during the row because memory ran out.
    """
    text = str(error)
    cause = text.strip().partition("\n")[0][:300] or type(error).__name__
    if isinstance(error, ConfigError):
        return REFUSED, cause
    if _KILLED.search(cause):
        if oom_kills > 0:
            return OUT_OF_MEMORY, f"{cause} The kernel killed {oom_kills} process(es) because memory ran out."
        return KILLED, cause
    return (OUT_OF_MEMORY if _NO_MEMORY.search(text) else FAILED), cause


def count_oom_kills() -> int:
    """Return the number of processes that the kernel has killed because memory ran out; 0 if unknown."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
