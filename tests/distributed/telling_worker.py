"""Ranks for ``test_local.py``: each reports its own state, and takes its time if its run's name says so.

The module takes the place of the local launcher's worker: it leaves each run's result, and ``rank-N.json`` beside it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tutorial_lib.records import RunDirectory, write_atomically


def main(configs_file: str, rendezvous: str) -> None:
    for flat in json.loads(Path(configs_file).read_text()):
        run = RunDirectory(Path(flat["storage"]) / flat["name"])
        told = {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "rank": os.environ["RANK"],
            "rendezvous": rendezvous,
            "directory": os.getcwd(),
            "path": sys.path,
            "variable": os.environ.get("TUTORIAL_LIB_TEST_VARIABLE"),
            "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        }
        write_atomically(run.path / f"rank-{told['rank']}.json", json.dumps(told))
        print(f"rank {told['rank']} speaks", flush=True)
        if flat["name"] == "fails":
            raise ValueError("of this rank alone" if told["rank"] == "0" else "of a peer")
        if flat["name"] == "sleeps":
            time.sleep(600)
        if told["rank"] == "0":
            run.result_file.write_text("{}")


if __name__ == "__main__":
    main(*sys.argv[1:])
