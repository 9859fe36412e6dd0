"""Tensor-parallel layout of a parameter, for any engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """Layout of one parameter on the ranks of a tensor-parallel group.

    Attributes:
        parameter: name of the parameter.
        how: ``column`` (each rank computes some of the outputs), ``row`` (each rank computes with some of the inputs,
            and the results are summed), or ``replicated``.
        dim: the tensor dimension that is split into equal shares, by tensor-parallel rank; None if replicated.
        before: shape of the full parameter.
        after: shape of this rank's share.
        partitions: number of ranks that ZeRO-3 or FSDP2 divides the share over; 1 if it is not divided.
        bytes: bytes that this rank holds.
    """

    parameter: str
    how: str
    dim: int | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    partitions: int
    bytes: int
