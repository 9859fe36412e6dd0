"""A training cell in a real Jupyter kernel: one interrupt stops it, and nothing is left when the kernel is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import psutil
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

SETUP = """
from tutorial_lib import launch
from tutorial_lib.config import Config
config = Config.create("cpu", launcher="local", dp=2, zero_stage=1, steps=1000, evaluate=False, storage={storage!r})
launch.warm_up(config)
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def result_of(client: BlockingKernelClient, cell: str) -> tuple[dict[str, Any], str]:
    """Wait for a cell's end, and return the reply and its standard error."""
    reply = client.get_shell_msg(timeout=120)
    while reply["parent_header"].get("msg_id") != cell:
        reply = client.get_shell_msg(timeout=120)
    written = ""
    while True:
        try:
            message = client.get_iopub_msg(timeout=2)
        except Empty:
            return reply["content"], written
        if message["msg_type"] == "stream" and message["content"]["name"] == "stderr":
            written += message["content"]["text"]


def test_one_interrupt_stops_the_cell_and_a_restart_leaves_nothing(kernel: Any, tmp_path: Path) -> None:
    manager, client = kernel
    storage = tmp_path / "runs"
    reply, _ = result_of(client, client.execute(SETUP.format(storage=str(storage))))
    assert reply["status"] == "ok", reply
    cell = client.execute("launch.run_all([config.override(name=name) for name in ('a', 'b', 'c')])")
    while not (storage / "a" / "metrics.jsonl").exists():
        time.sleep(0.1)
    interrupted = time.monotonic()
    manager.interrupt_kernel()
    reply, written = result_of(client, cell)
    assert time.monotonic() - interrupted < 30
    assert (reply["status"], reply["ename"]) == ("error", "Interrupted"), "Run All stops here"
    assert "and was saved; not started: b, c. Run it again to continue from there." in reply["evalue"]
    assert written.startswith("Stopping: saving after this step.")
    assert not (storage / "b" / "metrics.jsonl").exists()

    cell = client.execute("launch.run(config.override(name='a'))")
    rows = (storage / "a" / "metrics.jsonl").read_text().count("\n")
    while (storage / "a" / "metrics.jsonl").read_text().count("\n") <= rows + 1:
        time.sleep(0.1)
    left = psutil.Process(manager.provisioner.pid).children(recursive=True)
    assert len(left) == 3, "a server and two ranks"
    manager.restart_kernel(now=True)
    assert psutil.wait_procs(left, timeout=10)[1] == []
