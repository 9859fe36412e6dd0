"""Waiting worker: rank 0 fails, and rank 1 waits and ignores SIGTERM."""

import os
import signal
import sys
import time

from tests.unit.launch.workers.aborting import run_of


def main(configs_file: str, _rendezvous: str) -> None:
    run = run_of(configs_file)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ["RANK"] == "1":
        (run.logs / "waits").touch()
        time.sleep(60)
    while not (run.logs / "waits").exists():
        time.sleep(0.01)
    run.write_error(0, ModuleNotFoundError("No module named 'tensorboard'"))
    sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
