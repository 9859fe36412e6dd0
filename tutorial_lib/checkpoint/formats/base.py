"""Full tensors of a checkpoint: the interface that a page of each on-disk format implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor

from tutorial_lib.checkpoint.manifest import CheckpointError
from tutorial_lib.config import Config

WEIGHTS, OPTIMIZER = "weights", "optimizer"
WEIGHTS_AND_OPTIMIZER = "weights and optimizer"
"""What a file of a checkpoint holds, in the words of a report."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every trained parameter, besides the number of its updates."""

WEIGHT = "weight"


class FullTensors(ABC):
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
        return self._checked(name, self._read(name, WEIGHT))

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
