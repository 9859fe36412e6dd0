"""Cases for the test of the driver: a compiler that is killed, and the next one, which waits for its lock."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tests.gpu.cases import Cases, Setting


def cases(setting: Setting) -> Cases:
    """Return a case that hangs while it holds the lock, and one that waits for the lock."""
    return {"killed": lambda: _compile(seconds=60), "again": lambda: _compile(seconds=0)}


def _compile(seconds: float) -> dict[str, Any]:
    lock = Path(os.environ["TORCH_EXTENSIONS_DIR"], "cpu_adam", "lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while lock.exists():
        time.sleep(0.05)
    lock.touch()
    time.sleep(seconds)
    lock.unlink()
    return {}
