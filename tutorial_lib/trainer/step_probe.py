"""Step probe: the model states, activations, peak memory and traffic of one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from tutorial_lib.engine import Engine
from tutorial_lib.measure.memory import Allocations, StateBytes, count_allocations, tensor_bytes
from tutorial_lib.measure.traffic import Traffic, count_collectives
from tutorial_lib.mpu import Topology
from tutorial_lib.records import STEPS_UNTIL_MEASURED


def measured_step(first: int, last: int) -> int:
    """Return the step that a start of a run measures: its third, or the last one of a shorter start.

    Args:
        first: number of steps that were done when it began.
        last: the step at which it ends.
    """
    return min(first + STEPS_UNTIL_MEASURED, last)


class StepProbe:
    """Measures one optimizer step of this rank.

    Args:
        topology: this rank's place in the grid, so that traffic is counted per axis.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._states: StateBytes | None = None
        self._traffic: Traffic | None = None
        self._allocations = Allocations()
        self._gathered: list[int] = []

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count collectives and allocations while the block runs."""
        with count_collectives(self._topology.axes()) as self._traffic, count_allocations() as self._allocations:
            yield

    @contextmanager
    def forward(self, engine: Engine) -> Iterator[None]:
        """Note what a forward pass and its loss leave allocated for backward.

        Parameters that ZeRO-3 or FSDP2 gathered in it and still hold are not activations, so they are left out.
        """
        parameters = list(engine.module.parameters())
        # ZeRO-3 keeps this rank's share of a parameter in ds_tensor; with one rank, gathering copies nothing.
        before = [each.detach() for p in parameters for each in (p, getattr(p, "ds_tensor", p))]
        self._allocations.mark()
        yield
        self._allocations.mark()
        self._gathered.append(tensor_bytes([*before, *engine.module.parameters()]) - tensor_bytes(before))

    def note_states(self, engine: Engine) -> None:
        """Note the bytes of parameters, gradients and optimizer states, if they are more than before."""
        now = StateBytes.of(engine.state_tensors())
        if self._states is None or now.total > self._states.total:
            self._states = now

    def measurements(self, engine: Engine, step: int) -> dict[str, Any]:
        """Return the measurements of a step, ready for JSON."""
        assert self._states is not None and self._traffic is not None
        return {
            "step": step,
            "state_bytes": self._states.to_dict(),
            "activation_bytes": self.activation_bytes(),
            "peak_bytes": dict(self._allocations.peak),
            "traffic": self._traffic.to_dict(),
            "num_parameters": engine.num_parameters,
            "layout": [asdict(row) for row in engine.layout()] if self._topology.tp > 1 else None,
        }

    def activation_bytes(self) -> int:
        """Return the bytes that a forward pass left for backward: the maximum over all micro-batches."""
        held = [sum(devices.values()) for devices in self._allocations.at_marks]
        return max(
            after - before - gathered
            for before, after, gathered in zip(held[::2], held[1::2], self._gathered, strict=True)
        )
