"""Consistency checks within a tensor-parallel group: its ranks must read the same batches and compute the same loss.

These ranks share every layer, but nothing in the layers notices if they get different batches or draw different dropout
masks: losses still look plausible. The trainer therefore exchanges a fingerprint of each rank's batches, and its loss,
together with a few numbers that all ranks need anyway. Every rank sees all of them, so all ranks raise together and
none is left waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

from tutorial_lib.mpu import Topology

SAME_LOSS = 1e-4
"""Largest relative difference between the losses within a group that rounding can explain."""


class RanksDisagree(RuntimeError):
    """Ranks of a tensor-parallel group read different batches or computed different losses. The message names them."""


def check_batches(topology: Topology, step: int | None, fingerprints: Sequence[int]) -> None:
    """Refuse batches that differ within a tensor-parallel group.

    Args:
        topology: this rank's place in the grid.
        step: number of the step, from 1, for the message.
        fingerprints: by world rank, from :func:`tutorial_lib.dataloader.collate.fingerprint`.

    Raises:
        RanksDisagree: names the ranks and their fingerprints.
    """
    for ranks in topology.grid():
        own = [fingerprints[rank] for rank in ranks]
        if len(set(own)) > 1:
            raise RanksDisagree(
                f"{_at(step)} ranks {ranks} share every layer, but read different batches, with the fingerprints "
                f"{', '.join(f'{number % 2**64:016x}' for number in own)}. Check the data loader's arguments: "
                "dp_rank and dp_size, not the world rank and world size."
            )


def check_losses(topology: Topology, step: int | None, losses: Sequence[float]) -> None:
    """Refuse losses that differ within a tensor-parallel group by more than :data:`SAME_LOSS`.

    Args:
        topology: this rank's place in the grid.
        step: number of the step, from 1, for the message.
        losses: by world rank. NaN and infinity are left to the check of the sum.

    Raises:
        RanksDisagree: names the ranks and their losses.
    """
    for ranks in topology.grid():
        own = [losses[rank] for rank in ranks]
        if max(own) - min(own) > SAME_LOSS * max(map(abs, own)):
            raise RanksDisagree(
                f"{_at(step)} ranks {ranks} share every layer and read the same batch, but their losses "
                f"differ: {', '.join(f'{number:.6f}' for number in own)}. Look at the seed, which must be the same "
                "within a tensor-parallel group (dropout masks and random weights depend on it), and at the all-reduce "
                "of the row-parallel layers."
            )


def _at(step: int | None) -> str:
    return "In a step" if step is None else f"At step {step}"
