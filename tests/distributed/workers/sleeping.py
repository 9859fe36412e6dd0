"""Sleeping worker: each rank reports its own state, and then does nothing for ten minutes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.distributed.workers.reporting_state import report_state
from tutorial_lib.records import RunDirectory


def main(configs_file: str, rendezvous: str) -> None:
    (flat,) = json.loads(Path(configs_file).read_text())
    report_state(RunDirectory(Path(flat["storage"]) / flat["name"]), rendezvous)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
