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

HELD_AT = 4
"""Step at which a run with all ranks waits until a node is lost. The smaller run then waits until the node is back."""

TIMEOUT = 3
"""Seconds that a run waits for resources that are in use."""

IS_BACK = "node-is-back"
"""Name of a file in the run's directory that the test creates when the node has joined the cluster again."""


def elastic(config: Config) -> None:
    """Train with :mod:`tests.cluster.slow_worker` while the test removes a node and brings it back."""
    ray_train.GROW_SECONDS, ray_train.SETTLE_SECONDS = 1.0, 2.0
    launch.run_all([config], worker="tests.cluster.slow_worker")


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
