"""Take-home scripts of ``notebooks/scripts``, importable by name, so that a lesson can show and start them.

>>> from tutorial_lib.lab.scripts import train_fsdp
>>> show_source(train_fsdp, only="train")
>>> torchrun(train_fsdp, 2, "--model", "gpt2", "--steps", 20)
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import psutil

DIRECTORY = Path(__file__).parents[2] / "notebooks" / "scripts"


def __getattr__(name: str) -> ModuleType:
    """Import the script of this name.

    Raises:
        AttributeError: there is no such script, or the package is installed without the course.
    """
    path = DIRECTORY / f"{name}.py"
    if name.startswith("_") or not path.is_file():
        found = ", ".join(sorted(script.stem for script in DIRECTORY.glob("*.py")))
        raise AttributeError(
            f"notebooks/scripts has no {name}.py. It has: {found or 'nothing: use a clone of the repository'}."
        )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = globals()[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchrun(
    script: ModuleType, num_ranks: int, *arguments: object, on_line: Callable[[str], object] = lambda line: None
) -> list[str]:
    """Start a script with torchrun in several processes on this machine, and return the lines that it prints.

    Args:
        script: a script from :data:`DIRECTORY`.
        num_ranks: number of processes.
        *arguments: arguments of the script; numbers and paths are converted to text.
        on_line: called with each line as soon as it is printed.

    Raises:
        RuntimeError: a rank failed; the message ends with its standard error.
        KeyboardInterrupt: this process was interrupted. torchrun and all ranks are killed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += [str(script.__file__), *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"} | os.environ
    lines = []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                on_line(lines[-1])
            failed = process.wait()
        except BaseException:
            _kill(process)
            raise
        if failed:
            errors.seek(0)
            raise RuntimeError(f"{script.__name__} failed on {num_ranks} ranks:\n{errors.read()[-3000:]}")
    return lines


def _kill(launcher: subprocess.Popen[str]) -> None:
    """Kill torchrun and its ranks: after a signal while it starts them, torchrun itself would leave some running."""
    with suppress(psutil.NoSuchProcess):
        torchrun = psutil.Process(launcher.pid)
        torchrun.suspend()
        while torchrun.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.01)  # it stops only once a rank that it is starting is its child, and starts no more
        for process in [*torchrun.children(recursive=True), torchrun]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    launcher.wait()
