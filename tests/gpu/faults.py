"""Faulty cases for the tests, which a step must survive: one that raises, one that hangs, one that dies."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

from tests.gpu.cases import Cases, Setting


def cases(setting: Setting) -> Cases:
    """Return a good case before the bad ones, and another after them."""
    return {"before": _good, "raises": _raise, "hangs": _hang, "dies": lambda: os._exit(7), "after": _good}


def _good() -> dict[str, Any]:
    return {"wait_seconds": 0.0}


def _raise() -> dict[str, Any]:
    raise ValueError("a library of another version")


def _hang() -> dict[str, Any]:
    subprocess.Popen(["sleep", "600"], start_new_session=True)  # outside our process group, like ninja's compilers
    time.sleep(600)
    return {}
