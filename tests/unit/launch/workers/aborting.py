"""Aborting worker: rank 0 aborts without a traceback, as C++ code would, after rank 1 has failed."""

import json
import os
import resource
import sys
import time
from pathlib import Path

from tutorial_lib.records import RunDirectory


def main(configs_file: str, _rendezvous: str) -> None:
    run = run_of(configs_file)
    fail_on_rank_1(run)
    abort()


def run_of(configs_file: str) -> RunDirectory:
    (flat,) = json.loads(Path(configs_file).read_text())
    return RunDirectory(Path(flat["storage"]) / flat["name"])


def fail_on_rank_1(run: RunDirectory) -> None:
    """Write an error on rank 1, and return on rank 0 once it has been written."""
    if os.environ["RANK"] == "1":
        run.write_error(1, RuntimeError("of a peer"))
        time.sleep(60)  # the launcher ends it
    while not run.errors():
        time.sleep(0.01)


def abort() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("what(): from C++", file=sys.stderr, flush=True)
    os.abort()


if __name__ == "__main__":
    main(*sys.argv[1:])
