"""Writer of a rank's files, on the thread of a background save."""

import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem

from tutorial_lib.checkpoint.rank_writer import Writer, make_stager


@pytest.mark.parametrize("in_background", [False, True])
def test_a_background_save_leaves_the_gpu_alone(in_background, tmp_path, monkeypatch):
    """DCP's loader for GPU tensors waits for the kernels of training, and uses GPU 0 from a thread of any rank."""
    loads = []

    class GpuLoader(filesystem._SerialCpuLoader):
        def __init__(self, resolve_fun, **named):
            super().__init__(resolve_fun)
            loads.append(threading.current_thread().name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", GpuLoader)
    writer, saved, loaded = (
        Writer(tmp_path, make_stager() if in_background else None),
        torch.arange(5.0),
        torch.zeros(5),
    )

    def save(states):
        dcp.save(states, storage_writer=writer.sharded(tmp_path), no_dist=True)

    writer.submit(save, writer.snapshot({"weights": saved}))
    writer.wait()
    assert loads == ([] if in_background else ["MainThread"])
    dcp.load({"weights": loaded}, checkpoint_id=tmp_path, no_dist=True)
    assert loaded.equal(saved)
