"""Common code of a step's processes: ``python -m tests.gpu.cases MODULE EVENTS FIRST SETTING DRIVER``.

It runs MODULE's cases while the process with the id DRIVER, which has started it, lives.

MODULE has a function ``cases(setting)`` that returns names and functions. Each function does one measurement and
returns JSON-serializable values; quantities are named with their unit (``peak_bytes``, ``step_seconds``). If a function
raises, its case is recorded as failed, with the error, and the next one runs.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Cases = dict[str, Callable[[], dict[str, Any]]]
PR_SET_PDEATHSIG = 1

AT_END = ExitStack()
"""Resources that this process's cases share, such as a process group; released after the last case."""


@dataclass(frozen=True)
class Setting:
    """Setting of the measurements.

    Args:
        device: ``cuda`` or ``cpu``.
        size: ``full``, ``quick`` (a look in at most three minutes) or ``tiny`` (a rehearsal on a CPU).
        scratch: directory for runs, models and data; all steps share it.
        out: directory for results.
        only: regular expression of the cases to run.
    """

    device: str
    size: str
    scratch: str
    out: str
    only: str = ""

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    def path(self, name: str) -> Path:
        return Path(self.scratch) / name

    def pick(self, **by_size: Any) -> Any:
        """Return the value for this size: ``full``, ``quick`` or ``tiny``."""
        return by_size[self.size]


def main(module: str, events_file: str, first: str, setting_json: str, driver: str) -> None:
    """Run the cases of a module from number ``first`` on."""
    if sys.platform == "linux":  # end this process, too, when the driver is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(driver):  # it was killed before
            return
    setting = Setting(**json.loads(setting_json))
    found = importlib.import_module(module).cases(setting)
    cases = {name: measure for name, measure in found.items() if re.search(setting.only, name)}
    with AT_END, open(events_file, "a", encoding="utf-8", buffering=1) as events:

        def record(event: str, **content: Any) -> None:
            events.write(json.dumps({"event": event, "time": time.time(), **content}) + "\n")

        record("plan", cases=list(cases))
        for number, (name, measure) in enumerate(cases.items()):
            if number < int(first):
                continue
            print(f"=== {name}", flush=True)
            record("start", number=number)
            try:
                outcome: dict[str, Any] = {"result": measure()}
            except Exception as error:
                traceback.print_exc()
                last = traceback.format_exception(error)[-12:]
                outcome = {"error": {"type": type(error).__name__, "message": str(error), "traceback": "".join(last)}}
                del error
            clear_memory()
            record("end", number=number, **outcome)


def clear_memory() -> None:
    """Free the allocator's cache after a case, so that the next one starts without it."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    from tests.gpu import cases  # not __main__, so that all modules share one AT_END

    cases.main(*sys.argv[1:])
