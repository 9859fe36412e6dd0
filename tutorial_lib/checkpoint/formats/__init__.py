"""Whole tensors, one at a time, out of the files that each engine's ranks have written.

Every engine cuts a parameter, its fp32 master copy and both of Adam's moments in its own way. What is common to all is
the whole: the names, shapes and order of the Hugging Face model. So a checkpoint of one shape becomes one of another by
way of the whole, a parameter at a time; and an export is the same without the moments. With t tensor-parallel and d
data-parallel ranks, the files of one parameter W are::

    torch            W
    fsdp             pieces of any shape, with an index of where each lies (DCP)
    deepspeed 0      share 1 ... share t       each in the file of one tensor-parallel rank, if AutoTP has split it
    deepspeed 1, 2   share i = a stretch of one long vector, cut into d files wherever their bounds happen to fall
    deepspeed 3      share i = d equal pieces, the last one padded; what AutoTP has not split: d t equal pieces

Files are memory-mapped or read in parts: no more than about one parameter is held in memory, whatever the model's size.
DeepSpeed's own converter (``ds_to_universal``) writes all of this out as files first, and the tests compare with it.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tutorial_lib.checkpoint.directory import CheckpointError, read_trainer_state, verify
from tutorial_lib.config import Config
from tutorial_lib.models import freeze_parameters
from tutorial_lib.models.fused_qkv import by_part, is_fused_by_part

LAYOUT = "layout.json"
"""Among the files of an engine that splits parameters over tensor-parallel ranks: how each of them was split."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every trained parameter, besides the number of its updates."""

_WEIGHT = "weight"


def open_whole(path: Path, *, verified: bool = False) -> Whole:
    """The whole tensors of a checkpoint. They are pickled, so every byte is verified before any of it is opened.

    Args:
        path: a checkpoint's directory, ``step-NNNNNNNN``.
        verified: the caller has just done that.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    if not verified:
        verify(path)
    settings = Config.from_json(json.dumps(read_trainer_state(path)["config"]))
    model = _outline(path, settings)
    stages = (_DeepSpeed0, _DeepSpeed12, _DeepSpeed12, _DeepSpeed3)
    of_engine = {"torch": _Torch, "fsdp": _FSDP, "deepspeed": stages[settings.engine.zero_stage]}
    reader: Whole = of_engine[settings.engine.name](path / "engine", settings, model)
    return reader


def _outline(path: Path, settings: Config) -> Any:
    """The checkpoint's model without values, for its names, shapes and ties, and what of it is not trained."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path / "model"), dtype=torch.float32)
    model.tie_weights()
    freeze_parameters(model, settings.model.freeze)
    return model


class Whole(ABC):
    """Reads a checkpoint's parameters, and the optimizer's states of those that are trained, whole.

    Attributes:
        names: all parameters as the Hugging Face model's ``named_parameters`` gives them: a tied one under its first
            name alone.
        trained: those that the optimizer updates; the others are frozen.
        shapes: by name.
    """

    def __init__(self, directory: Path, settings: Config, model: Any) -> None:
        self._directory, self._settings = directory, settings
        self._model_type: str = model.config.model_type
        parameters = dict(model.named_parameters())
        self.names = tuple(parameters)
        self.trained = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._buffer_names = tuple(name for name, _ in model.named_buffers())
        self._number = {name: number for number, name in enumerate(self.trained)}

    def parameter(self, name: str) -> Tensor:
        """A whole parameter, fp32, on the CPU: of what was trained in 16 bits, the fp32 master copy."""
        return self._checked(name, self._read(name, _WEIGHT))

    def moment(self, name: str, which: str) -> Tensor:
        """Adam's ``exp_avg`` or ``exp_avg_sq`` of a whole trained parameter, fp32, on the CPU."""
        return self._checked(name, self._read(name, which))

    @abstractmethod
    def adam_step(self, name: str) -> int:
        """How often Adam has updated a trained parameter. Updates that fp16 skipped do not count."""

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that the engine has saved beside its parameters. Few models have such: most compute theirs anew."""
        return {}

    @abstractmethod
    def _read(self, name: str, kind: str) -> Tensor: ...

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) != self.shapes[name]:
            raise CheckpointError(
                f"{self._directory} holds {name} in the shape {tuple(tensor.shape)}, and the model's configuration "
                f"beside it says {self.shapes[name]}."
            )
        return tensor.float()


class _Torch(Whole):
    def _read(self, name: str, kind: str) -> Tensor:
        tensor: Tensor = self._weights[name] if kind == _WEIGHT else self._state(name)[kind]
        return tensor

    def adam_step(self, name: str) -> int:
        return int(self._state(name)["step"])

    def buffers(self) -> dict[str, Tensor]:
        return {name: self._weights[name] for name in self._buffer_names if name in self._weights}

    def _state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer["state"][self._number[name]]
        return state

    @functools.cached_property
    def _weights(self) -> dict[str, Tensor]:
        return dict(torch.load(self._directory / "model.pt", map_location="cpu", mmap=True, weights_only=True))

    @functools.cached_property
    def _optimizer(self) -> dict[str, Any]:
        return dict(torch.load(self._directory / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True))


class _FSDP(Whole):
    def _read(self, name: str, kind: str) -> Tensor:
        tensor = torch.empty(self.shapes[name])
        self._load({"parameters" if kind == _WEIGHT else kind: {name: tensor}})
        if is_fused_by_part(name, self._model_type):
            return by_part(tensor, self._settings.parallel.tp).contiguous()
        return tensor

    def adam_step(self, name: str) -> int:
        return int(self._steps[self._number[name]])

    @functools.cached_property
    def _steps(self) -> Tensor:
        steps = torch.empty(len(self.trained))
        self._load({"step": steps})
        return steps

    def _load(self, wanted: dict[str, Any]) -> None:
        """Fill tensors in place. DCP finds in its index, a pickle, the files and the parts of them that it needs."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*load in a single process")  # that is the intent
            dcp.load(wanted, checkpoint_id=str(self._directory), no_dist=True)


class _DeepSpeed(Whole):
    """What the stages have in common: files by rank, and the shares of tensor-parallel ranks side by side."""

    def __init__(self, directory: Path, settings: Config, model: Any) -> None:
        super().__init__(directory, settings, model)
        # DeepSpeed's files name its classes. Imported for them, unasked it would warn that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        self._dp, self._tp = settings.parallel.dp, settings.parallel.tp
        rows = json.loads((directory / LAYOUT).read_text(encoding="utf-8")) if self._tp > 1 else []
        self._layout: dict[str, dict[str, Any]] = {row["parameter"]: row for row in rows}
        self._opened: dict[str, Any] = {}

    def _read(self, name: str, kind: str) -> Tensor:
        dim = self._layout[name]["dim"] if self._tp > 1 else None
        if dim is None:
            return self._share(0, name, kind)
        return torch.cat([self._share(tp_rank, name, kind) for tp_rank in range(self._tp)], dim)

    @abstractmethod
    def _share(self, tp_rank: int, name: str, kind: str) -> Tensor:
        """A parameter, or what belongs to it, as far as one tensor-parallel rank has it."""

    def buffers(self) -> dict[str, Tensor]:
        state = self._model_states(0)
        return {name: state["module"][name] for name in state["buffer_names"] or ()}

    def _model_states(self, tp_rank: int) -> Any:
        return self._file(f"mp_rank_{tp_rank:02d}_model_states.pt")

    def _optimizer(self, dp_rank: int, tp_rank: int) -> Any:
        precision = "bf16_" if self._settings.engine.precision == "bf16" else ""
        name = f"{precision}zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt"
        return self._file(name)["optimizer_state_dict"]

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            # Mapped: tensors are read when they are used, and only as much of them.
            path = self._directory / "engine" / name
            self._opened[name] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        return self._opened[name]


class _DeepSpeed0(_DeepSpeed):
    def _share(self, tp_rank: int, name: str, kind: str) -> Tensor:
        tensor: Tensor
        if kind != _WEIGHT:
            weight = self._share(tp_rank, name, _WEIGHT)
            tensor = self._state(tp_rank, name).get(kind, torch.zeros_like(weight, dtype=torch.float32))
        elif name in self._number and self._settings.engine.precision != "fp32":
            # The masters have no names: they are in the order of the trained parameters.
            groups = self._model_states(tp_rank)["optimizer"]["fp32_groups"]
            tensor = next(itertools.islice(itertools.chain(*groups), self._number[name], None)).detach()
        else:
            tensor = self._model_states(tp_rank)["module"][name]
        return tensor

    def adam_step(self, name: str) -> int:
        return int(self._state(0, name).get("step", 0))

    def _state(self, tp_rank: int, name: str) -> dict[str, Any]:
        optimizer = self._model_states(tp_rank)["optimizer"]
        states = optimizer.get("optimizer_state_dict", optimizer)["state"]  # wrapped in 16 bits
        # Nothing is there before the first update.
        state: dict[str, Any] = states.get(self._number[name], {})
        return state


class _DeepSpeed12(_DeepSpeed):
    """Each group of parameters is one vector, padded at its end, of which every data-parallel rank has a stretch."""

    def __init__(self, directory: Path, settings: Config, model: Any) -> None:
        super().__init__(directory, settings, model)
        self._places = [self._places_of(tp_rank) for tp_rank in range(self._tp)]

    def _places_of(self, tp_rank: int) -> dict[str, tuple[int, int, torch.Size]]:
        """By name: the group, where the parameter begins in its vector, and its shape."""
        # In the order of the vector, which is not always that of the model (round_robin_gradients).
        groups = self._model_states(tp_rank)["param_shapes"]
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
            frozen: Tensor = self._model_states(tp_rank)["module"][name]
            return frozen
        group, first, shape = self._places[tp_rank][name]
        last = first + shape.numel()
        pieces, start = [], 0
        for dp_rank in range(self._dp):
            stretch = self._stretch(dp_rank, tp_rank, group, kind)
            if stretch is None:
                return torch.zeros(shape)
            pieces.append(stretch[max(first - start, 0) : max(last - start, 0)])
            start += stretch.numel()
        return torch.cat(pieces).view(shape)

    def _stretch(self, dp_rank: int, tp_rank: int, group: int, kind: str) -> Tensor | None:
        if kind == _WEIGHT:
            masters: Tensor = self._optimizer(dp_rank, tp_rank)["single_partition_of_fp32_groups"][group].detach()
            return masters
        return self._state(dp_rank, tp_rank, group).get(kind)

    def _state(self, dp_rank: int, tp_rank: int, group: int) -> dict[str, Any]:
        # Nothing is there before the first update.
        state: dict[str, Any] = self._optimizer(dp_rank, tp_rank)["base_optimizer_state"]["state"].get(group, {})
        return state

    def adam_step(self, name: str) -> int:
        return int(self._state(0, 0, self._places[0][name][0]).get("step", 0))


class _DeepSpeed3(_DeepSpeed):
    """Every parameter is cut into equal pieces, and a rank's pieces of a group of parameters are one vector."""

    def __init__(self, directory: Path, settings: Config, model: Any) -> None:
        super().__init__(directory, settings, model)
        self._ranks = [(dp_rank, tp_rank) for dp_rank in range(self._dp) for tp_rank in range(self._tp)]
        self._places = [self._places_of(tp_rank) for tp_rank in range(self._tp)]

    def _places_of(self, tp_rank: int) -> dict[str, tuple[int, int, torch.Size]]:
        """By name: the group, where a rank's piece begins in its vector, and the shape of what is cut."""
        places = {}
        for group, shapes in enumerate(self._rank_states(0, tp_rank)["param_shapes"]):
            first = 0
            for name, shape in shapes.items():
                places[name] = (group, first, shape)
                first += self._piece_numel(name, shape)
        return places

    def _pieces(self, name: str) -> int:
        # What AutoTP has split is cut among the data-parallel ranks, and all else, as it was when the model was built,
        # among all ranks. DeepSpeed's own merge (zero_to_fp32) knows one number of ranks alone.
        return int(self._layout[name]["partitions"]) if self._tp > 1 else self._dp

    def _piece_numel(self, name: str, shape: torch.Size) -> int:
        return -(-shape.numel() // self._pieces(name))

    def _share(self, tp_rank: int, name: str, kind: str) -> Tensor:
        among_all = self._pieces(name) == len(self._ranks)
        ranks = self._ranks if among_all else [rank for rank in self._ranks if rank[1] == tp_rank]
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

    def _vector(self, dp_rank: int, tp_rank: int, group: int, kind: str) -> Tensor | None:
        if kind == _WEIGHT:
            masters: Tensor = self._optimizer(dp_rank, tp_rank)["fp32_flat_groups"][group].detach()
            return masters
        return self._state(dp_rank, tp_rank, group).get(kind)

    def _state(self, dp_rank: int, tp_rank: int, group: int) -> dict[str, Any]:
        # Nothing is there before the first update.
        optimizer = self._optimizer(dp_rank, tp_rank)["optimizer_state_dict"]
        state: dict[str, Any] = optimizer["state"].get(group, {})
        return state

    def adam_step(self, name: str) -> int:
        return int(self._state(0, 0, self._places[0][name][0]).get("step", 0))

    def _rank_states(self, dp_rank: int, tp_rank: int) -> Any:
        return self._file(f"zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_model_states.pt")

    def _model_states(self, tp_rank: int) -> Any:
        return self._rank_states(0, tp_rank)
