"""Seconds that a launch takes with a warm server and with new interpreters, in the same program and from the shell.

Each round starts new programs, alternately with and without the warm server. A program launches a four-step run on two
ranks three times; the first launch includes the imports of its checks and the loading of the server.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.on_ranks import run_on_ranks
from tests.support.commands import train_command
from tests.support.launching import ROOT
from tutorial_lib.config import Config
from tutorial_lib.embedded import dataset_directory
from tutorial_lib.launch import worker

ROUNDS = 3
LAUNCHES = 3
WAYS = {"warm": "1", "cold": "0"}


def measure() -> dict[str, Any]:
    """Return median seconds of a program's first launch, of its fastest later one, and of a launch from the shell."""
    dataset_directory("embedded/news")
    seconds: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for number in range(ROUNDS):
        for way in WAYS:
            with tempfile.TemporaryDirectory(prefix="tutorial-lib-bench-") as storage:
                for what, took in {**_in_a_program(storage, way), "shell": _from_the_shell(storage, way)}.items():
                    seconds[way].setdefault(what, []).append(took)
        print(f"bench: startup, round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
    medians = {way: {what: statistics.median(took) for what, took in all_.items()} for way, all_ in seconds.items()}
    ratios = {
        what: sorted(c / w for c, w in zip(seconds["cold"][what], seconds["warm"][what], strict=True))
        for what in ("first", "second", "shell")
    }
    return {
        "rounds": ROUNDS,
        "seconds": medians,
        "times_faster": {
            what: {"median": statistics.median(r), "lowest": r[0], "highest": r[-1]} for what, r in ratios.items()
        },
    }


def config(storage: str, name: str) -> Config:
    """Return the configuration of four steps of ZeRO-1 on two ranks."""
    return Config.create(
        "cpu", storage=storage, name=name, launcher="local", dp=2, zero_stage=1, steps=4, evaluate=False,
        max_examples=160,
    )  # fmt: skip


def launch_often(storage: str) -> None:
    """Print, as JSON, the seconds that each launch took in total, and on its slowest rank."""
    launches = []
    for number in range(LAUNCHES):
        began = time.perf_counter()
        run = run_on_ranks(__name__, [config(storage, f"run-{number}")])[0]
        whole = time.perf_counter() - began
        ranks = [json.loads(path.read_text())["seconds"] for path in run.directory.path.glob("timed-*.json")]
        launches.append((whole, max(ranks)))
    print(json.dumps(launches))


def main(configs_file: str, rendezvous: str) -> None:
    """Run one rank, and record the duration of its part."""
    began = time.perf_counter()
    worker.main(configs_file, rendezvous)
    (flat,) = json.loads(Path(configs_file).read_text())
    target = Path(flat["storage"]) / flat["name"] / f"timed-{os.environ['RANK']}.json"
    target.write_text(json.dumps({"seconds": time.perf_counter() - began}))


def _in_a_program(storage: str, way: str) -> dict[str, float]:
    code = f"from tests.benchmarks.startup import launch_often; launch_often({storage!r})"
    (first, _), *others = json.loads(_run([sys.executable, "-c", code], way))
    second, own = min(others)
    return {"first": first, "second": second, "beyond the run": second - own}


def _from_the_shell(storage: str, way: str) -> float:
    began = time.perf_counter()
    _run([sys.executable, "-m", *train_command(config(storage, f"shell-{way}"))], way)
    return time.perf_counter() - began


def _run(command: list[str], way: str) -> str:
    environment = {**os.environ, "TUTORIAL_LIB_WARM_WORKERS": WAYS[way], "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main(*sys.argv[1:])
