"""What tensor parallelism did to each parameter, whichever engine did it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """How one parameter lies on the ranks of a tensor-parallel group.

    Attributes:
        parameter: its name.
        how: ``column`` (each rank computes some of the outputs), ``row`` (each rank computes with some of the inputs,
            and the results are summed), or ``replicated``.
        dim: the tensor dimension that is split into equal shares, by tensor-parallel rank; None where replicated.
        before: shape of the whole parameter.
        after: shape of this rank's share.
        partitions: over how many ranks ZeRO-3 divides the share once more; 1 where nothing does.
        bytes: what this rank holds of it.
    """

    parameter: str
    how: str
    dim: int | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    partitions: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name, as JSON takes them."""
        return dataclasses.asdict(self)
