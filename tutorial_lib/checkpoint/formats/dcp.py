"""Checkpoints of FSDP: pieces of any shape, with an index of where each is (``torch.distributed.checkpoint``)."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tutorial_lib.checkpoint.formats.base import WEIGHT, WEIGHTS_AND_OPTIMIZER, FullTensors
from tutorial_lib.models.fused_qkv import by_part, is_fused_by_part


class DCP(FullTensors):
    def _stored_names(self) -> Iterable[str]:
        stored = self._reader.read_metadata().state_dict_metadata
        return (name.partition(".")[2] for name in stored if name.startswith(("parameters.", "buffers.")))

    def _read(self, name: str, kind: str) -> Tensor:
        tensor = torch.empty(self.shapes[name])
        self._load({"parameters" if kind == WEIGHT else kind: {name: tensor}})
        if is_fused_by_part(name, self._model_type):
            return by_part(tensor, self._tp).contiguous()
        return tensor

    def buffers(self) -> dict[str, Tensor]:
        stored = self._reader.read_metadata().state_dict_metadata
        found = {
            name.removeprefix("buffers."): torch.empty(tensor.size, dtype=tensor.properties.dtype)
            for name, tensor in stored.items()
            if name.startswith("buffers.") and isinstance(tensor, TensorStorageMetadata)
        }
        if found:
            self._load({"buffers": found})
        return found

    def adam_step(self, name: str) -> int:
        return int(self._steps[self._number[name]])

    @functools.cached_property
    def _steps(self) -> Tensor:
        steps = torch.empty(len(self.trained))
        self._load({"step": steps})
        return steps

    def _load(self, wanted: dict[str, Any]) -> None:
        """Fill tensors in place. DCP looks up the parts of files that it needs in its index, which is a pickle."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*load in a single process")  # that is intended
            try:
                dcp.load(wanted, storage_reader=self._reader, no_dist=True)
            except CheckpointException as error:  # a BaseException, with this process's own error inside
                ((own, _),) = error.failures.values()
                raise own from error

    @functools.cached_property
    def _reader(self) -> FileSystemReader:
        return Reader(self._directory)


class Reader(FileSystemReader):
    """Reader that reads the index only once. Otherwise the full index would be read again for every tensor."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = super().read_metadata(*args, **kwargs)
        return self._index


def rank_and_contents(name: str) -> tuple[int, str] | None:
    """Return the rank that wrote a file of this format, and the file's contents, or None for any other file."""
    if found := re.search(r"__(\d+)_\d+\.distcp$", name):
        return int(found[1]), WEIGHTS_AND_OPTIMIZER
    return (0, "index of the shards") if name == "engine/.metadata" else None
