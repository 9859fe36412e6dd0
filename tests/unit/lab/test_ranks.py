"""Functions and scripts on several ranks that are forked from this process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from tutorial_lib.lab.ranks import on_ranks, script_on_ranks


def test_every_rank_calls_the_function_in_one_process_group() -> None:
    factor = 10

    def add_up(power: int) -> list[float]:  # a local function, like those of a notebook's cells
        print("not shown")
        number = torch.tensor(float(factor**power * dist.get_rank()))
        dist.all_reduce(number)
        return [dist.get_rank(), dist.get_world_size(), number.item()]

    assert on_ranks(3, add_up, 2) == [[0, 3, 300.0], [1, 3, 300.0], [2, 3, 300.0]]


def test_ranks_see_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a script would train on a GPU, and in bf16, although the lesson says that it runs on CPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert on_ranks(2, os.getenv, "CUDA_VISIBLE_DEVICES") == ["", ""]


def test_output_of_a_rank_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    on_ranks(1, lambda: print("said by a rank"))
    assert capfd.readouterr().out == ""


def test_log_records_of_a_rank_do_not_reach_the_notebooks_handlers(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "notebook.log")
    logger = logging.getLogger("of-a-library")
    logger.addHandler(handler)
    try:
        on_ranks(1, lambda: logger.warning("said by a rank"))
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert (tmp_path / "notebook.log").read_text() == ""


def test_an_error_of_one_rank_ends_the_others_and_is_reported() -> None:
    def fail() -> None:
        if dist.get_rank() == 1:
            raise ValueError("rank 1 has a reason")
        dist.barrier()

    with pytest.raises(ProcessRaisedException, match="rank 1 has a reason"):
        on_ranks(2, fail)


def test_an_interrupt_leaves_no_rank_behind() -> None:
    """Each rank waits for the other one in a different call, in which it does not notice an interrupt."""

    def deadlock() -> None:
        if dist.get_rank() == 0:
            os.kill(os.getppid(), signal.SIGINT)
            dist.barrier()
        dist.recv(torch.ones(1), 0)

    try:
        with pytest.raises(KeyboardInterrupt):
            on_ranks(2, deadlock)
    finally:
        left = multiprocessing.active_children()
        for process in left:
            process.kill()
    assert left == []


SCRIPT = """
import os, sys
import torch, torch.distributed as dist
if __name__ == "__main__":
    rank, number = int(os.environ["RANK"]), torch.tensor(float(sys.argv[1]))
    dist.all_reduce(number)
    print("rank", rank, "of", os.environ["WORLD_SIZE"], "sum", number.item())
    dist.destroy_process_group()
"""


def test_a_script_runs_on_every_rank_as_under_torchrun(tmp_path: Path) -> None:
    script = ModuleType("adds")
    script.__file__ = str(tmp_path / "adds.py")
    (tmp_path / "adds.py").write_text(SCRIPT)
    assert script_on_ranks(2, script, 1.5) == ["rank 0 of 2 sum 3.0"]
