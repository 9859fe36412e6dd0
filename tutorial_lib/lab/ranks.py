"""Functions and scripts on several ranks, which are forked from this process so that they start at once."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def on_ranks(num_ranks: int, function: Callable[..., T], *arguments: Any) -> list[T]:
    """Call a function in several processes that form a process group, and return what each rank returned.

    The processes are forked from this one, so the function may be one of a notebook's cells. They compute on CPUs, with
    one thread each, and communicate over the loopback interface only. Their output is not shown.

    Args:
        num_ranks: number of processes.
        function: called on every rank; its result must be picklable.
        *arguments: the same for every rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: the function raised on a rank; the message is its traceback. The
            other ranks are terminated.
        KeyboardInterrupt: this process was interrupted. All ranks are killed.
    """
    import torch.multiprocessing as mp

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it warns about each rank that it ends
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        scratch = Path(name)
        others = multiprocessing.active_children()
        try:
            mp.start_processes(_run_rank, (num_ranks, scratch, function, arguments), num_ranks, start_method="fork")
        except BaseException:
            ranks = [process for process in multiprocessing.active_children() if process not in others]
            for process in ranks:
                process.kill()  # a rank that waits for another one inside a collective ignores an interrupt
            for process in ranks:
                process.join()
            raise
        return [pickle.loads((scratch / str(rank)).read_bytes()) for rank in range(num_ranks)]


def _run_rank(rank: int, num_ranks: int, scratch: Path, function: Callable[..., object], arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    sys.stdout = (scratch / f"{rank}.out").open("w")
    sys.stderr = (scratch / f"{rank}.err").open("w")
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        os.dup2(stream.fileno(), descriptor)
    logging.disable(logging.CRITICAL)  # handlers still write where the notebook's output goes
    os.environ.update(CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")  # CPUs, and the loopback interface
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    torch.set_num_threads(1)  # threads do not survive a fork
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=num_ranks)
    dist.barrier()  # a rank that ended before all have connected would make the others fail
    result = function(*arguments)
    (scratch / str(rank)).write_bytes(pickle.dumps(result))
    if dist.is_initialized():  # a script may have destroyed it already
        dist.destroy_process_group()


def script_on_ranks(num_ranks: int, script: ModuleType, *arguments: object) -> list[str]:
    """Run a script on several ranks, as torchrun does, and return the lines that rank 0 prints.

    New processes would have to import PyTorch and transformers first; forked ones already have them. The process group
    exists already, and a script joins it through ``init_device_mesh``, which would otherwise make one.

    Args:
        num_ranks: number of processes.
        script: a script from :mod:`tutorial_lib.lab.scripts`.
        *arguments: arguments of the script; numbers and paths are converted to text.

    Raises:
        torch.multiprocessing.ProcessRaisedException: the script failed on a rank; the message is the traceback.
    """
    return on_ranks(num_ranks, _run_as_main, str(script.__file__), list(map(str, arguments)))[0]


def _run_as_main(file: str, arguments: list[str]) -> list[str]:
    sys.argv = [file, *arguments]
    sys.path.insert(0, str(Path(file).parent))  # as for any script: it may import its neighbours
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(file, run_name="__main__")
    return printed.getvalue().splitlines()
