"""A last case for the tests that takes a second, in a process that refuses to end."""

from __future__ import annotations

import time
from typing import Any

from tests.gpu.cases import AT_END, Cases, Setting


def cases(setting: Setting) -> Cases:
    """Return one case."""
    AT_END.callback(time.sleep, 60)
    return {"last": _wait}


def _wait() -> dict[str, Any]:
    time.sleep(1)
    return {"wait_seconds": 1.0}
