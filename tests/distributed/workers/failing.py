"""Failing worker: each rank reports its own state, and raises."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.distributed.workers.reporting_state import report_state
from tutorial_lib.records import RunDirectory


def main(configs_file: str, rendezvous: str) -> None:
    (flat,) = json.loads(Path(configs_file).read_text())
    report_state(RunDirectory(Path(flat["storage"]) / flat["name"]), rendezvous)
    print("buffered, so it comes after the traceback")
    raise ValueError("of this rank alone" if os.environ["RANK"] == "0" else "of a peer")


if __name__ == "__main__":
    main(*sys.argv[1:])
