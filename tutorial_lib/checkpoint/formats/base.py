"""Full tensors of a checkpoint: the interface that each on-disk format implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.checkpoint.manifest import CheckpointError
from tutorial_lib.config import EngineConfig, ParallelConfig

WEIGHTS, OPTIMIZER = "weights", "optimizer"
WEIGHTS_AND_OPTIMIZER = "weights and optimizer"
OPTIMIZER_AND_MASTERS = "optimizer and fp32 weights"
SCRIPTS = "scripts that DeepSpeed adds"
"""Names that reports use for the contents of a checkpoint's files."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Moments that AdamW keeps for every trained parameter, besides the number of its updates."""

WEIGHT = "weight"
"""The parameter itself, as opposed to its :data:`MOMENTS`."""


def names_without_duplicates(state: dict[str, Tensor]) -> list[str]:
    """Return the names in a module's state, with only the first name of tied parameters, which share memory."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr(), tensor.shape), name)
    return list(first.values())


class FullTensors(ABC):
    """Reader of a checkpoint's full parameters, and of the optimizer states of the trained ones.

    Attributes:
        names: names of all parameters, as in the Hugging Face model's ``named_parameters``: a tied one appears only
            under its first name.
        trained: names of the parameters that the optimizer updates; the others are frozen.
        shapes: full shapes by name.
    """

    def __init__(self, directory: Path, engine: EngineConfig, parallel: ParallelConfig, model: Any) -> None:
        self._directory, self._engine, self._tp = directory, engine, parallel.tp
        self._model_type: str = model.config.model_type
        parameters = dict(model.named_parameters())
        self.names = tuple(parameters)
        self.trained = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._buffer_names = tuple(name for name, _ in model.named_buffers())
        self._number = {name: number for number, name in enumerate(self.trained)}

    def check_names(self) -> None:
        """Refuse files that do not hold exactly the parameters in the model configuration next to them.

        Raises:
            CheckpointError: names the extra or missing parameters.
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
        """Return a full parameter in fp32 on the CPU, or its fp32 master copy if it was trained in 16 bits."""
        return self._checked(name, self._read(name, WEIGHT))

    def moment(self, name: str, which: str) -> Tensor:
        """Return Adam's full ``exp_avg`` or ``exp_avg_sq`` of a trained parameter, in fp32 on the CPU."""
        return self._checked(name, self._read(name, which))

    @abstractmethod
    def adam_step(self, name: str) -> int:
        """Return the number of updates that Adam made to a trained parameter, without those that fp16 skipped."""

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers that the engine saved. Few models have any: most recompute theirs."""
        return {}

    def restore_buffers(self, model: nn.Module) -> None:
        """Copy the saved buffers into a model. Without saved ones, its buffers keep their values."""
        own = dict(model.named_buffers(remove_duplicate=False))
        for name, buffer in self.buffers().items():
            own[name].copy_(buffer)

    @abstractmethod
    def _stored_names(self) -> Iterable[str]:
        """Return the names of the stored parameters, and perhaps buffers; tied ones appear under their first name."""

    @abstractmethod
    def _read(self, name: str, kind: str) -> Tensor:
        """Return a full parameter (``WEIGHT``) or one of its moments."""

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) != self.shapes[name]:
            raise CheckpointError(
                f"{self._directory} holds {name} in the shape {tuple(tensor.shape)}, but the model's configuration "
                f"beside it says {self.shapes[name]}."
            )
        return tensor.float()
