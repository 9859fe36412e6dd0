"""Launch of your own training loop on local ranks, such as the one in ``notebooks/scripts/train_zero.py``."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tutorial_lib.config import Config, ConfigError
from tutorial_lib.launch import local
from tutorial_lib.launch.checks import preflight
from tutorial_lib.records import RunDirectory

Loop = Callable[[dict[str, Any]], Any]
"""Function that takes ``{"config": JSON text}``, as Ray's ``TorchTrainer`` calls it on every worker."""


def run_loop(loop: Loop, config: Config) -> Any:
    """Call a training loop on every rank of a local launch, and return rank 0's result, sent as JSON.

    The ranks' output goes into the run's logs.

    Args:
        loop: a function in a Python file, which every rank imports.
        config: what to run, with ``launcher="local"``.

    Raises:
        ConfigError: the configuration cannot run here, or the loop is not in a file; no rank was started.
        WorkerError: a rank failed. All ranks have ended when this is raised.
    """
    file = Path(inspect.getfile(loop))
    if not file.is_file() or config.run.launcher != "local":
        raise ConfigError(
            f"run_loop needs launcher='local' (here {config.run.launcher!r}), and a loop in a file that each rank can "
            f"import (here {file}). Put the loop in a .py file, or pass it to Ray's TorchTrainer."
        )
    config = preflight(config)
    run = RunDirectory(config.directory)
    run.create()
    run.clear_requests()
    with TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        local.launch([config], lambda: None, __name__, (str(file.resolve()), loop.__name__, str(result)))
        return json.loads(result.read_text())


def main(configs_file: str, rendezvous: str, file: str, name: str, result: str) -> None:
    """Run one rank: import the loop and call it in a process group of all ranks."""
    from tutorial_lib.launch import worker

    worker.main(configs_file, rendezvous, functools.partial(_call, file, name, Path(result)))


def _call(file: str, name: str, result: Path, configs: Sequence[Config]) -> None:
    from tutorial_lib.mpu import Topology
    from tutorial_lib.trainer.signals import output_to

    (config,) = configs
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rank = Topology.from_environment(config.parallel).rank
    with output_to(RunDirectory(config.directory).log_file(rank)):
        returned = getattr(module, name)({"config": config.to_json()})
    if rank == 0:
        result.write_text(json.dumps(returned))


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
