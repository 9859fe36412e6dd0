"""Reporting worker: each rank reports its own state instead of training.

It takes the place of the local launcher's worker, and writes each run's result, and ``rank-N.json`` beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tutorial_lib.records import RunDirectory, write_atomically


def main(configs_file: str, rendezvous: str) -> None:
    for flat in json.loads(Path(configs_file).read_text()):
        run = RunDirectory(Path(flat["storage"]) / flat["name"])
        report_state(run, rendezvous)
        if os.environ["RANK"] == "0":
            run.result_file.write_text("{}")


def report_state(run: RunDirectory, rendezvous: str) -> None:
    """Write this rank's state into the run's directory, and print a line."""
    rank = os.environ["RANK"]
    state = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "rank": rank,
        "rendezvous": rendezvous,
        "directory": os.getcwd(),
        "path": sys.path,
        "variable": os.environ.get("TUTORIAL_LIB_TEST_VARIABLE"),
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
    }
    write_atomically(run.path / f"rank-{rank}.json", json.dumps(state))
    print(f"rank {rank} speaks", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
