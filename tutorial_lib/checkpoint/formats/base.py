"""Full tensors of a checkpoint: the interface that a page of each on-disk format implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checkpoint.manifest import CheckpointError
from tutorial_lib.config import Config

WEIGHTS, OPTIMIZER = "weights", "optimizer"
WEIGHTS_AND_OPTIMIZER = "weights and optimizer"
OPTIMIZER_AND_MASTERS = "optimizer and fp32 weights"
SCRIPTS = "scripts that DeepSpeed adds"
"""What a file of a checkpoint holds, in the words of a report."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every trained parameter, besides the number of its updates."""

WEIGHT = "weight"
"""The parameter itself, beside its :data:`MOMENTS`."""


def names_once(state: dict[str, Tensor]) -> list[str]:
    """Return the names in a module's state, of tied parameters (which share memory) only the first."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr(), tensor.shape), name)
    return list(first.values())


class FullTensors(ABC):
    """Reader of a checkpoint's full parameters, and of the optimizer's states of those that are trained.

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

    def check_names(self) -> None:
        """Refuse files that do not hold exactly the parameters of the model that is described beside them.

        Raises:
            CheckpointError: names the parameters that are too many or missing.
        """
        stored = set(self._stored_names())
        unknown = stored - {*self.names, *self._buffer_names}
        missing = set(self.names) - stored
        for names, what in ((unknown, "holds parameters that"), (missing, "lacks parameters that")):
            if names:
                says = "does not know" if names is unknown else "has"
                raise CheckpointError(
                    f"{self._directory} {what} the model configuration beside it {says}: {', '.join(sorted(names))}. "
                    "Nothing was loaded, because the result would be a different model. If an older version saved this "
                    "checkpoint, train again from the model that the run started from."
                )

    def parameter(self, name: str) -> Tensor:
        """Return a full parameter, fp32, on the CPU; for one trained in 16 bits, the fp32 master copy."""
        return self._checked(name, self._read(name, WEIGHT))

    def moment(self, name: str, which: str) -> Tensor:
        """Return Adam's full ``exp_avg`` or ``exp_avg_sq`` of a trained parameter, fp32, on the CPU."""
        return self._checked(name, self._read(name, which))

    @abstractmethod
    def adam_step(self, name: str) -> int:
        """Return how often Adam has updated a trained parameter. Updates that fp16 skipped do not count."""

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers that the engine has saved. Few models have any: most compute theirs again."""
        return {}

    @abstractmethod
    def _stored_names(self) -> Iterable[str]:
        """Return the names of all parameters in the files, a tied one under its first name, and maybe of buffers."""

    @abstractmethod
    def _read(self, name: str, kind: str) -> Tensor:
        """Return a full parameter (``WEIGHT``) or one of its moments."""

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) != self.shapes[name]:
            raise CheckpointError(
                f"{self._directory} holds {name} in the shape {tuple(tensor.shape)}, and the model's configuration "
                f"beside it says {self.shapes[name]}."
            )
        return tensor.float()
