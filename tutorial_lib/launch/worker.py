"""Worker program of the local launcher: one rank of a run.

The warm server calls :func:`main` in a forked process; without a warm server, each rank is a new interpreter that runs
``python -m tutorial_lib.launch.worker CONFIGS RENDEZVOUS``. Neither runs the caller's main script again, so scripts
need no ``if __name__ == "__main__"`` guard.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tutorial_lib.config import Config
from tutorial_lib.launch.torchrun import process_group
from tutorial_lib.trainer import train_all


def main(configs_file: str, rendezvous: str, train: Callable[[Sequence[Config]], object] = train_all) -> None:
    """Train the configurations in a JSON file one after the other, as the rank that the environment describes.

    Args:
        configs_file: file with a list of configurations, each as its flat settings.
        rendezvous: path of a new file through which the ranks find each other.
        train: called with the configurations, in a process group of all ranks.
    """
    configs = [Config.from_json(json.dumps(flat)) for flat in json.loads(Path(configs_file).read_text())]
    with process_group(configs[0].run, f"file://{rendezvous}"):
        train(configs)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
