"""What each process of the local launcher runs: ``python -m tutorial_lib.launch.worker CONFIGS RENDEZVOUS``.

A module of its own instead of a function that ``multiprocessing`` spawns: spawning runs the caller's main script again
in every worker, and a script without an ``if __name__ == "__main__"`` guard would start itself without end.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from tutorial_lib.config import Config
from tutorial_lib.launch.joined import process_group
from tutorial_lib.trainer import train


def main(configs_file: str, rendezvous: str) -> None:
    """Train the configurations of a JSON list one after the other, as the rank that the environment names."""
    # Should the launching process be killed, the kernel sends this, and the run saves and stops at its next step.
    _prctl_pr_set_pdeathsig(signal.SIGTERM)
    configs = [Config.from_json(json.dumps(flat)) for flat in json.loads(Path(configs_file).read_text())]
    with process_group(configs[0], f"file://{rendezvous}"):
        for config in configs:
            train(config)


if __name__ == "__main__":
    main(*sys.argv[1:])
