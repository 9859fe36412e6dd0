"""Checkpoints of DeepSpeed: the names of its files, and how each ZeRO stage cuts the tensors in them.

With t tensor-parallel and d data-parallel ranks, one parameter W is stored as::

    stage 0       share 1 ... share t       each in the file of one tensor-parallel rank, if AutoTP split it
    stages 1, 2   share i = a slice of one long vector, which is cut into d files without regard to parameters
    stage 3       share i = d equal pieces, the last one padded; a parameter that AutoTP did not split: d x t pieces
"""

from __future__ import annotations

import itertools
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checkpoint.formats.base import (
    OPTIMIZER_AND_MASTERS,
    SCRIPTS,
    WEIGHT,
    WEIGHTS,
    WEIGHTS_AND_OPTIMIZER,
    FullTensors,
    names_without_duplicates,
)
from tutorial_lib.config import EngineConfig, ParallelConfig

LAYOUT = "layout.json"
"""File, next to the engine's own files, that records how tensor parallelism split each parameter."""


class _Stage(FullTensors):
    """Common part of all stages: find files by rank, and join the shares of tensor-parallel ranks.

    Args:
        folder: folder of the files within ``directory``, named by DeepSpeed's tag.
    """

    def __init__(
        self, directory: Path, engine: EngineConfig, parallel: ParallelConfig, model: Any, folder: str = "engine"
    ) -> None:
        super().__init__(directory, engine, parallel, model)
        self._folder = folder
        # Unpickling these files imports DeepSpeed, which would otherwise warn if there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        self._dp = parallel.dp
        rows = json.loads((directory / LAYOUT).read_text(encoding="utf-8")) if self._tp > 1 else []
        self._layout: dict[str, dict[str, Any]] = {row["parameter"]: row for row in rows}
        self._opened: dict[str, Any] = {}

    def _stored_names(self) -> Iterable[str]:
        return names_without_duplicates(self._model_file(0)["module"])

    def _read(self, name: str, kind: str) -> Tensor:
        dim = self._layout[name]["dim"] if self._tp > 1 else None
        if dim is None:
            return self._share(0, name, kind)
        return torch.cat([self._share(tp_rank, name, kind) for tp_rank in range(self._tp)], dim)

    @abstractmethod
    def _share(self, tp_rank: int, name: str, kind: str) -> Tensor:
        """Return one tensor-parallel rank's share of a parameter or of its moment."""

    def buffers(self) -> dict[str, Tensor]:
        state = self._model_file(0)
        return {name: state["module"][name] for name in state["buffer_names"] or ()}

    def _model_file(self, tp_rank: int) -> Any:
        return self._file(f"mp_rank_{tp_rank:02d}_model_states.pt")

    def _optimizer(self, dp_rank: int, tp_rank: int) -> Any:
        precision = "bf16_" if self._engine.precision == "bf16" else ""
        name = f"{precision}zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt"
        return self._file(name)["optimizer_state_dict"]

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            # Memory-mapped: tensors are read when they are used, and only as far as needed.
            path = self._directory / self._folder / name
            self._opened[name] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        return self._opened[name]


class Stage0(_Stage):
    def _share(self, tp_rank: int, name: str, kind: str) -> Tensor:
        tensor: Tensor
        if kind != WEIGHT:
            weight = self._share(tp_rank, name, WEIGHT)
            tensor = self._state(tp_rank, name).get(kind, torch.zeros_like(weight, dtype=torch.float32))
        elif name in self._number and self._engine.precision != "fp32":
            # Master copies have no names: they are in the order of the trained parameters.
            groups = self._model_file(tp_rank)["optimizer"]["fp32_groups"]
            tensor = next(itertools.islice(itertools.chain(*groups), self._number[name], None)).detach()
        else:
            tensor = self._model_file(tp_rank)["module"][name]
        return tensor

    def adam_step(self, name: str) -> int:
        return int(self._state(0, name).get("step", 0))

    def _state(self, tp_rank: int, name: str) -> dict[str, Any]:
        optimizer = self._model_file(tp_rank)["optimizer"]
        states = optimizer.get("optimizer_state_dict", optimizer)["state"]  # nested if trained in 16 bits
        # There is no state before the first update.
        state: dict[str, Any] = states.get(self._number[name], {})
        return state


class _SlicedStage(_Stage):
    """Common part of stages 1 to 3: a rank holds its slices of each parameter group as one vector."""

    _master_vectors: str

    def __init__(
        self, directory: Path, engine: EngineConfig, parallel: ParallelConfig, model: Any, folder: str = "engine"
    ) -> None:
        super().__init__(directory, engine, parallel, model, folder)
        self._places = [self._places_of(tp_rank) for tp_rank in range(self._tp)]

    @abstractmethod
    def _places_of(self, tp_rank: int) -> dict[str, tuple[int, int, torch.Size]]:
        """Return each parameter's group, its first index in a rank's vector, and its shape, by name."""

    def _vector(self, dp_rank: int, tp_rank: int, group: int, kind: str) -> Tensor | None:
        if kind == WEIGHT:
            masters: Tensor = self._optimizer(dp_rank, tp_rank)[self._master_vectors][group].detach()
            return masters
        return self._state(dp_rank, tp_rank, group).get(kind)

    @abstractmethod
    def _state(self, dp_rank: int, tp_rank: int, group: int) -> dict[str, Any]:
        """Return Adam's state of a rank's vector, which is empty before the first update."""

    def adam_step(self, name: str) -> int:
        return int(self._state(0, 0, self._places[0][name][0]).get("step", 0))


class Stage12(_SlicedStage):
    """Stages 1 and 2: each parameter group is one vector, padded and cut into one slice per rank."""

    _master_vectors = "single_partition_of_fp32_groups"

    def _places_of(self, tp_rank: int) -> dict[str, tuple[int, int, torch.Size]]:
        # The shapes are in the vector's order, which differs from the model's with round_robin_gradients.
        groups = self._model_file(tp_rank)["param_shapes"]
        paddings = self._optimizer(0, tp_rank)["param_alignment_paddings"]
        places = {}
        for group, (shapes, after) in enumerate(zip(groups, paddings, strict=True)):
            first = 0
            for (name, shape), padding in zip(shapes.items(), after, strict=True):
                places[name] = (group, first, shape)
                first += shape.numel() + padding
        return places

    def _share(self, tp_rank: int, name: str, kind: str) -> Tensor:
        if name not in self._number:
            frozen: Tensor = self._model_file(tp_rank)["module"][name]
            return frozen
        group, first, shape = self._places[tp_rank][name]
        last = first + shape.numel()
        pieces, start = [], 0
        for dp_rank in range(self._dp):
            vector = self._vector(dp_rank, tp_rank, group, kind)
            if vector is None:
                return torch.zeros(shape)
            pieces.append(vector[max(first - start, 0) : max(last - start, 0)])
            start += vector.numel()
        return torch.cat(pieces).view(shape)

    def _state(self, dp_rank: int, tp_rank: int, group: int) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer(dp_rank, tp_rank)["base_optimizer_state"]["state"].get(group, {})
        return state


class Stage3(_SlicedStage):
    """Stage 3: every parameter is cut into equal pieces, and a rank's pieces of a parameter group form one vector."""

    _master_vectors = "fp32_flat_groups"

    def _places_of(self, tp_rank: int) -> dict[str, tuple[int, int, torch.Size]]:
        places = {}
        for group, shapes in enumerate(self._rank_states(0, tp_rank)["param_shapes"]):
            first = 0
            for name, shape in shapes.items():
                places[name] = (group, first, shape)
                first += self._piece_numel(name, shape)
        return places

    def _stored_names(self) -> Iterable[str]:
        state = self._rank_states(0, 0)
        return itertools.chain(*state["param_shapes"], state["frozen_param_shapes"] or ())

    def _pieces(self, name: str) -> int:
        # Parameters that AutoTP split are cut among the data-parallel ranks, all others among all ranks, as they
        # were when the model was built. DeepSpeed's own merge (zero_to_fp32) assumes a single number of ranks.
        return int(self._layout[name]["partitions"]) if self._tp > 1 else self._dp

    def _piece_numel(self, name: str, shape: torch.Size) -> int:
        return -(-shape.numel() // self._pieces(name))

    def _share(self, tp_rank: int, name: str, kind: str) -> Tensor:
        among_all = self._pieces(name) == self._dp * self._tp
        tp_ranks = range(self._tp) if among_all else [tp_rank]
        ranks = [(dp_rank, each) for dp_rank in range(self._dp) for each in tp_ranks]
        if name not in self._number:
            states = [self._rank_states(*rank) for rank in ranks]
            shape = states[0]["frozen_param_shapes"][name]
            found = [state["frozen_param_fragments"][name] for state in states]
        else:
            group, first, shape = self._places[tp_rank][name]
            last = first + self._piece_numel(name, shape)
            vectors = [self._vector(*rank, group, kind) for rank in ranks]
            found = [vector[first:last] for vector in vectors if vector is not None]
            if not found:
                return torch.zeros(shape)
        return torch.cat(found)[: shape.numel()].view(shape)

    def _state(self, dp_rank: int, tp_rank: int, group: int) -> dict[str, Any]:
        optimizer = self._optimizer(dp_rank, tp_rank)["optimizer_state_dict"]
        state: dict[str, Any] = optimizer["state"].get(group, {})
        return state

    def _rank_states(self, dp_rank: int, tp_rank: int) -> Any:
        return self._file(f"zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_model_states.pt")

    def _model_file(self, tp_rank: int) -> Any:
        return self._rank_states(0, tp_rank)


STAGES: tuple[type[_Stage], ...] = (Stage0, Stage12, Stage12, Stage3)
"""Reader of each ZeRO stage."""


def rank_and_contents(name: str, tp: int, zero_stage: int) -> tuple[int, str] | None:
    """Return the rank that wrote a file of this format, and the file's contents, or None for any other file."""
    if found := re.search(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states\.pt$", name):
        rank = int(found[1]) * tp + int(found[2])
        return rank, OPTIMIZER_AND_MASTERS if found[3] == "optim" else "shapes and buffers"
    if found := re.search(r"mp_rank_(\d+)_model_states\.pt$", name):
        return int(found[1]), WEIGHTS if zero_stage else WEIGHTS_AND_OPTIMIZER
    return (0, SCRIPTS) if name.startswith("engine/") and name.endswith(".py") else None
