"""Exercise of lesson 00."""

from __future__ import annotations

from tutorial_lib.lab.exercises import Exercise, number


def accumulation(global_batch: int, dp: int, micro_batch: int) -> Exercise:
    """Return the exercise on the three batch sizes.

    Args:
        global_batch: rows of an optimizer step over all ranks.
        dp: ranks that read different data.
        micro_batch: rows of a forward pass on one rank.
    """
    expected = global_batch // (dp * micro_batch)
    return Exercise(
        f"{dp} GPUs train together with a global batch of {global_batch} rows. Each has memory for {micro_batch} rows "
        "at a time. How many micro-batches does each GPU add up before it takes a step?",
        check=number(
            expected,
            near={
                global_batch / micro_batch: f"That would be right for one GPU. Here {dp} of them share the batch.",
                global_batch / dp: f"That is how many rows each GPU gets. It computes {micro_batch} of them at a time.",
            },
        ),
        hints=[
            f"How many of the {global_batch} rows does each GPU get?",
            "global batch = dp (GPUs that read different rows) x micro-batch x accumulation",
        ],
        solution=f"{expected}: each GPU gets {global_batch} / {dp} = {global_batch // dp} rows and computes "
        f"{micro_batch} at a time. `Config.create('cpu', global_batch={global_batch}, dp={dp}, "
        f"micro_batch={micro_batch}).accumulation` says so, too.",
    )
