"""Exercises of the ZeRO workshop (lesson 05), checked against the reader's own runs.

The questions follow the workshop's. Hints and solutions are kept here, so that nobody reads them before the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutorial_lib.lab.exercises import Exercise, choice, number

MIB = 2**20


def when_to_stop(eval_losses: Sequence[float]) -> Exercise:
    """Return the exercise on overfitting.

    Args:
        eval_losses: losses of the reader's baseline after each epoch.
    """
    best = min(range(len(eval_losses)), key=eval_losses.__getitem__) + 1
    others = {
        str(epoch): f"Its evaluation loss is {loss:.3f}. Another epoch has a lower one."
        for epoch, loss in enumerate(eval_losses, 1)
        if epoch != best
    }
    return Exercise(
        "After which epoch would you keep the baseline's weights?",
        check=choice(str(best), near=others),
        hints=["The training loss cannot tell you.", "Look at the circles in the three-epoch loss figure."],
        solution=f"After epoch {best}, where the loss on questions that the model has not seen is lowest. "
        "`--keep-best` does this for you: it evaluates at every checkpoint and never deletes the best one.",
    )


def batch_on_more_gpus(per_device: int, accumulation: int, num_gpus: int) -> Exercise:
    """Return the exercise on the batch size that follows from ``"auto"``.

    Args:
        per_device: ``per_device_train_batch_size``.
        accumulation: ``gradient_accumulation_steps``.
        num_gpus: number of processes of the job in the question.
    """
    total = per_device * accumulation * num_gpus
    return Exercise(
        f"A colleague starts the `Trainer` cell of this lesson on {num_gpus} GPUs with `zero2.json` and changes "
        f"nothing (`per_device_train_batch_size={per_device}`, `gradient_accumulation_steps={accumulation}`). What "
        'does `"train_batch_size": "auto"` become?',
        check=number(
            total,
            near={
                per_device * accumulation: "That is the batch of one GPU.",
                per_device * num_gpus: "That is one forward pass on every GPU. Each optimizer step has several.",
            },
        ),
        hints=["Three numbers multiply."],
        solution=f"{per_device} x {accumulation} x {num_gpus} = {total}. The learning rate was chosen for "
        f"{per_device * accumulation}, so the colleague is training something else.",
    )


def fewest_bytes(rows: Sequence[Any]) -> Exercise:
    """Return the exercise on the stage with the least memory.

    Args:
        rows: rows of the reader's matrix of stages, with ``name`` and ``states_bytes``.
    """
    best = min(rows, key=lambda row: row.states_bytes)
    return Exercise(
        "Which row of the stage table holds the fewest bytes of model states per rank?",
        check=choice(
            best.name,
            near={row.name: f"It holds {row.states_bytes / MIB:.2f} MiB." for row in rows if row is not best},
        ),
        hints=["Compare the column states/rank."],
        solution=f"`{best.name}`, with {best.states_bytes / MIB:.2f} MiB.",
    )


def optimizer_share(num_parameters: int, num_ranks: int) -> Exercise:
    """Return the exercise on optimizer states under stage 1.

    Args:
        num_parameters: number of parameters of the reader's model.
        num_ranks: data-parallel size in the question.
    """
    share = -(-num_parameters // num_ranks)
    expected = 12 * share / MIB
    return Exercise(
        f"Predict first; the solution shows how to check. This model has {num_parameters:,} parameters and trains in "
        f"fp32 under stage 1. How many MiB of optimizer states does each rank hold on {num_ranks} processes?",
        check=number(
            expected,
            relative=0.01,
            unit="MiB",
            near={
                8 * share / MIB: "Those are the two moments. DeepSpeed keeps a master copy of the weights, too.",
                12 * num_parameters / MIB: "That is what all ranks hold together.",
            },
        ),
        hints=["4 bytes each for two moments and the master copy.", "Stage 1 divides them among the ranks."],
        solution=f"12 x {num_parameters:,} / {num_ranks} bytes = {expected:.2f} MiB. To see it, run\n\n"
        f'```\nmore = job.override(name="more", steps=4, dp={num_ranks})\n'
        'bench.run_matrix("zero-stages", more, rows=["stage-1"])\n```',
    )


def price_of_offload(change_percent: float) -> Exercise:
    """Return the exercise on the runtime of offload.

    Args:
        change_percent: change of stage 2's runtime through offload, in the reader's run.
    """
    return Exercise(
        "By how many percent did offload change the runtime of stage 2 in your run? A minus means that it became "
        "faster.",
        check=number(
            change_percent, tolerance=0.51, unit="%", near={-change_percent: "The sign is the other way round."}
        ),
        hints=["Look at the last column of the offload comparison."],
        solution=f"{change_percent:+.1f} %. Here nothing crosses a bus, and eight steps are few: DeepSpeed's CPU Adam "
        "replaces PyTorch's. On a GPU, gradients and weights also travel between device and host in every step.",
    )
