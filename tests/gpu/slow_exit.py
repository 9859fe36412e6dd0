"""A step for the tests: its only case takes a second, and then its process does not exit for a minute.

The driver must wait for the case, however short the grace period is, and then kill the process.
"""

from __future__ import annotations

import time
from typing import Any

from tests.gpu.cases import AT_END, Cases, Setting


def cases(setting: Setting) -> Cases:
    """Return one slow case, and keep this process alive after it."""
    AT_END.callback(time.sleep, 60)
    return {"last": _wait}


def _wait() -> dict[str, Any]:
    time.sleep(1)
    return {"wait_seconds": 1.0}
