"""Programs for the head node of a Ray cluster: ``python -m tests.cluster.ray_program NAME CONFIG``.

They take a configuration file and work like ``train --launcher ray``, with shorter timeouts and slower runs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tutorial_lib import launch
from tutorial_lib.config import Config
from tutorial_lib.launch.ray import train as ray_train
from tutorial_lib.records import RunDirectory

HELD_AT = 4
"""Step at which a run with all ranks waits for the loss of a node, and after which one with fewer ranks is slow."""

TIMEOUT = 3
"""Seconds that a run waits for resources that are in use."""

IS_BACK = "node-is-back"
"""Name of a file in the run's directory that the test creates when the node has joined the cluster again."""


def elastic(config: Config) -> None:
    """Train while the test removes a node and brings it back."""
    ray_train.GROW_SECONDS, ray_train.SETTLE_SECONDS = 1.0, 2.0
    ray_train._worker = _slow_worker
    launch.run(config)


def _slow_worker(given: dict[str, Any]) -> None:
    """Run a worker that pauses after each checkpoint. Its process has none of the test's patches."""
    import ray.train

    config, report = Config.from_json(given["configs"][0]), ray_train.report
    all_ranks, ranks_now = config.parallel.world_size, ray.train.get_context().get_world_size()
    has_lost_a_node = bool(RunDirectory(config.directory).restarts())

    def report_and_wait(row: dict[str, Any], path: Path) -> None:
        report(row, path)
        if not has_lost_a_node and row["step"] >= HELD_AT:
            time.sleep(1000)  # a node is about to be lost
        if ranks_now < all_ranks:
            until = time.monotonic() + 100
            while not (config.directory / IS_BACK).exists() and time.monotonic() < until:
                time.sleep(0.1)
            time.sleep(1.5)  # there is room now: give Ray time to see it

    ray_train.report = report_and_wait
    ray_train._worker(given)


def refusals(config: Config) -> None:
    """Print the error of each run that the cluster cannot hold, with the seconds that it took."""
    import ray
    from ray.util.placement_group import placement_group

    outcomes = {}
    with ray_train.session(config):

        def attempt(name: str, **changes: Any) -> None:
            began = time.monotonic()
            try:
                launch.run(config.override(name=name, **changes))
                error: BaseException | None = None
            except Exception as raised:
                error = raised
            outcomes[name] = [type(error).__name__, str(error), time.monotonic() - began]

        attempt("private", storage="/tmp/private-runs")
        attempt("own", storage="/tmp/own-runs")
        attempt("wide", tp=4, dp=1)
        attempt("large", dp=8)
        held = placement_group([{"CPU": 2}])
        ray.get(held.ready())
        attempt("busy", dp=2, tp=2, resource_timeout=TIMEOUT)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    {"elastic": elastic, "refusals": refusals}[sys.argv[1]](Config.from_json(Path(sys.argv[2]).read_text()))
