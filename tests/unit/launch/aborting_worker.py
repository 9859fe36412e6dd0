"""Ranks for ``test_launch.py``: rank 0 aborts, as C++ code would, after rank 1 has failed.

In a run called ``waiting``, rank 0 raises instead, and rank 1 waits where SIGTERM does not end it.

``python -m tests.unit.launch.aborting_worker CONFIGS RENDEZVOUS`` takes the place of the local launcher's worker.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from tutorial_lib.records import RunDirectory


def main(configs_file: str, _rendezvous: str) -> None:
    (flat,) = json.loads(Path(configs_file).read_text())
    run = RunDirectory(Path(flat["storage"]) / flat["name"])
    if flat["name"] == "waiting":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ["RANK"] == "1":
            (run.logs / "waits").touch()
            time.sleep(60)
        while not (run.logs / "waits").exists():
            time.sleep(0.01)
        run.write_error(0, ModuleNotFoundError("No module named 'tensorboard'"))
        sys.exit(1)
    if os.environ["RANK"] == "1":
        run.write_error(1, RuntimeError("of a peer"))
        time.sleep(60)  # the launcher ends it
    while not run.errors():
        time.sleep(0.01)
    if flat["name"] == "told":
        (run.logs / "rank-001.error.json").unlink()
        run.write_error(0, ValueError("its own"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("what(): from C++", file=sys.stderr, flush=True)
    os.abort()


if __name__ == "__main__":
    main(*sys.argv[1:])
