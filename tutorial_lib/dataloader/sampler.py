"""Order of examples: the examples of each optimizer step, and each rank's share of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from tutorial_lib.config import ConfigError

_GROUPED_STEPS = 50  # Enough to find examples of similar length, few enough to keep an epoch's order random.


def epoch_order(
    num_examples: int,
    *,
    global_batch: int,
    seed: int,
    epoch: int,
    lengths: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.int64]:
    """Choose the examples of each step of an epoch: ``[steps, global_batch]``.

    An epoch is a permutation without its last, incomplete step. Every epoch has a different permutation, so that no
    example is always left out.

    Args:
        num_examples: number of examples in the data set.
        global_batch: examples per step.
        seed: seed of the permutations.
        epoch: number of the epoch, from 0.
        lengths: tokens of each example, to group examples of similar length into steps: each block of 50 steps (or
            of a quarter of the epoch, if that is less) is sorted by length, then the epoch's steps are shuffled.
    """
    random = np.random.default_rng((seed, epoch))
    steps = num_examples // global_batch
    order = random.permutation(num_examples)[: steps * global_batch]
    if lengths is None:
        return order.reshape(steps, global_batch)
    # If an entire epoch were sorted at once, every epoch would consist of the same steps.
    window = min(_GROUPED_STEPS, max(1, steps // 4)) * global_batch
    windows = [order[start : start + window] for start in range(0, len(order), window)]
    grouped = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in windows])
    return grouped.reshape(steps, global_batch)[random.permutation(steps)]


class StepSampler(Sampler[list[int]]):
    """A data-parallel rank's examples of each optimizer step, for an endless series of epochs.

    The examples of a step are dealt out to the ranks like cards. With ``lengths`` they are sorted by length first, so
    that ranks get nearly equal token counts, and examples of similar length share a micro-batch. The state only counts
    steps, so it is valid for any number of ranks.

    Args:
        dp_rank: rank in the *data-parallel* group. Ranks that share a layer (tensor parallelism) must share a
            ``dp_rank``: they work on the same examples.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        global_batch: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
        lengths: NDArray[np.integer[Any]] | None = None,
    ) -> None:
        self.steps_per_epoch = num_examples // global_batch
        self._num_examples, self._global_batch, self._seed, self._lengths = num_examples, global_batch, seed, lengths
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._step = 0
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty((0, 0), dtype=np.int64))

    def examples(self, step: int) -> NDArray[np.int64]:
        """Return the examples of a step (from 0, over all epochs), for all ranks together: ``[global_batch]``."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = epoch_order(
                self._num_examples,
                global_batch=self._global_batch,
                seed=self._seed,
                epoch=epoch,
                lengths=self._lengths,
            )
            self._order = (epoch, order)
        return self._order[1][step_in_epoch]

    def own_examples(self, step: int) -> list[int]:
        """Return this rank's examples of a step."""
        mine: list[int] = self.examples(step)[self._dp_rank :: self._dp_size].tolist()
        return mine

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            mine = self.own_examples(self._step)
            self._step += 1
            yield mine

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after ``state["step"]`` steps.

        Raises:
            ConfigError: the state belongs to a different order of examples.
        """
        now = self._identity()
        if changed := [f"{key}={state[key]} then, {now[key]} now" for key in now if state[key] != now[key]]:
            raise ConfigError(
                f"The saved data position belongs to a different order of examples: {'; '.join(changed)}. "
                "Resume with the settings of the run that saved it, or start a run with another name."
            )
        self._step = state["step"]

    def _identity(self) -> dict[str, int]:
        return {"examples": self._num_examples, "global_batch": self._global_batch, "seed": self._seed}


class EpochSampler(Sampler[list[int]]):
    """A rank's micro-batches of one epoch, for a loop that starts each epoch itself and skips finished batches.

    Args:
        steps: sampler that decides the examples of each step.
        micro_batch: sequences per forward pass on one rank.
    """

    def __init__(self, steps: StepSampler, micro_batch: int) -> None:
        self._steps, self._micro_batch, self._epoch = steps, micro_batch, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch for the next iteration, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._steps.steps_per_epoch * (len(self._steps.own_examples(0)) // self._micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * self._steps.steps_per_epoch
        for step in range(first, first + self._steps.steps_per_epoch):
            mine = self._steps.own_examples(step)
            for start in range(0, len(mine), self._micro_batch):
                yield mine[start : start + self._micro_batch]
