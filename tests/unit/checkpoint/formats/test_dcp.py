"""Full tensors from files of torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp

from tutorial_lib.checkpoint.formats.dcp import DCP
from tutorial_lib.config import EngineConfig, ParallelConfig


def test_tensors_are_what_was_saved_and_the_index_is_read_once(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    model.config = SimpleNamespace(model_type="gpt2")
    saved = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save({"parameters": saved}, checkpoint_id=tmp_path, no_dist=True)
    full = DCP(tmp_path, EngineConfig(name="fsdp"), ParallelConfig(), model)
    full.check_names()
    (tmp_path / ".metadata").unlink()
    assert [name for name in full.names if not full.parameter(name).equal(saved[name])] == []
