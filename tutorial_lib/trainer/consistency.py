"""What the ranks of a tensor-parallel group must have in common, compared in every step.

They share every layer, and nothing in the layers notices when they are given different batches or draw different
dropout masks: losses go on looking plausible. The trainer therefore exchanges a fingerprint of each rank's batches,
and its loss, among a few numbers that all ranks need anyway. As every rank sees all of them, all ranks raise together
and none waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence

from tutorial_lib.mpu import Topology

SAME_LOSS = 1e-4
"""Relative difference up to which the losses of a group are the same but for rounding."""


class RanksDisagree(RuntimeError):
    """Ranks of one tensor-parallel group differ in what they must have in common. The message says where to look."""


def check_batches(topology: Topology, step: int | None, fingerprints: Sequence[int]) -> None:
    """Refuse batches that differ within a tensor-parallel group.

    Args:
        topology: the grid.
        step: the step that the batches are for, from 1, for the message.
        fingerprints: by world rank, as :func:`tutorial_lib.dataloader.collate.fingerprint` gives them.

    Raises:
        RanksDisagree: with the ranks and their fingerprints.
    """
    for ranks in topology.grid():
        own = [fingerprints[rank] for rank in ranks]
        if len(set(own)) > 1:
            raise RanksDisagree(
                f"{_at(step)} ranks {ranks} share every layer, but read different batches, of the fingerprints "
                f"{', '.join(f'{number % 2**64:016x}' for number in own)}. Look at what the data loader is given: "
                "dp_rank and dp_size, never the world rank and the world size."
            )


def check_losses(topology: Topology, step: int | None, losses: Sequence[float]) -> None:
    """Refuse losses that differ within a tensor-parallel group by more than :data:`SAME_LOSS`.

    Args:
        topology: the grid.
        step: the step that the losses are of, from 1, for the message.
        losses: by world rank. What is not a number, or infinite, is left to the check of the sum.

    Raises:
        RanksDisagree: with the ranks and their losses.
    """
    for ranks in topology.grid():
        own = [losses[rank] for rank in ranks]
        if max(own) - min(own) > SAME_LOSS * max(map(abs, own)):
            raise RanksDisagree(
                f"{_at(step)} ranks {ranks} share every layer and read the same batch, but the sums of its losses "
                f"differ: {', '.join(f'{number:.6f}' for number in own)}. Look at the seed, which must be the same "
                "within a tensor-parallel group (dropout masks and random weights depend on it), and at the all-reduce "
                "of the row-parallel layers."
            )


def _at(step: int | None) -> str:
    return "In one step" if step is None else f"At step {step}"
