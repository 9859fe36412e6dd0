"""Full tensors from files of torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tutorial_lib.checkpoint.formats.dcp import DCP
from tutorial_lib.config import EngineConfig, ParallelConfig


@pytest.fixture
def model() -> torch.nn.Module:
    model = torch.nn.Linear(4, 3)
    model.config = SimpleNamespace(model_type="gpt2")
    return model


@pytest.fixture
def full(model: torch.nn.Module, tmp_path: Path) -> DCP:
    saved = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save({"parameters": saved}, checkpoint_id=tmp_path, no_dist=True)
    return DCP(tmp_path, EngineConfig(name="fsdp"), ParallelConfig(), model)


def test_tensors_are_what_was_saved_and_the_index_is_read_once(
    model: torch.nn.Module, full: DCP, tmp_path: Path
) -> None:
    full.check_names()
    (tmp_path / ".metadata").unlink()
    saved = dict(model.named_parameters())
    assert [name for name in full.names if not full.parameter(name).equal(saved[name])] == []


def test_a_file_that_cannot_be_read_is_an_ordinary_error(full: DCP, tmp_path: Path) -> None:
    """PyTorch's own is a BaseException, which nobody catches."""
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__0_0\.distcp"):
        full.parameter(full.names[0])
