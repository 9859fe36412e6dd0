"""Exercises of the ZeRO workshop (lesson 05), checked against the reader's own runs.

The questions follow the workshop's. Hints and solutions are kept here, so that nobody reads them before the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutorial_lib.lab.exercises import Exercise, choice, number

MIB = 2**20
NO_CHANGE_PERCENT = 3
"""Changes below this many percent count as none."""


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


def peak_as_processes_are_added(one: Any, two: Any) -> Exercise:
    """Return the exercise on the memory of a process as processes are added.

    Args:
        one: record of the reader's row on one process, with ``states_bytes`` and ``peak_bytes``.
        two: record of a row with the same ZeRO stage and micro-batch on more processes.
    """
    before, after = (row.states_bytes / MIB for row in (one, two))
    words = {-1: "falls", 0: "stays", 1: "rises"}
    right = words[(after > before) - (after < before)]
    why = {
        "stays": "That is plain data parallelism, where every process holds everything.",
        "rises": "The states of the entire model stay the same size, however many processes hold them.",
        "falls": f"It was {before:.2f} MiB on one process and {after:.2f} MiB on more.",
    }
    return Exercise(
        "GPUs are added, each with the same micro-batch. Should the memory of a process stay constant? Compare stage 2 "
        "on one process and on two in your tables, and write for its model states `falls`, `stays` or `rises`.",
        check=choice(right, near={word: text for word, text in why.items() if word != right}),
        hints=["The rows are `2Z-1G1N` and `stage-2`.", "Which part does ZeRO divide?"],
        solution=f"From {before:.2f} to {after:.2f} MiB: more processes share gradients and optimizer states, down to "
        "the weights alone. What a step allocates on top does not shrink, because the micro-batch and the bucket are "
        f"the same: {one.peak_bytes / MIB:,.1f} and {two.peak_bytes / MIB:,.1f} MiB.",
    )


def what_pinning_changed(rows: Sequence[Any]) -> Exercise:
    """Return the exercise on pinned memory.

    Args:
        rows: rows of the reader's matrix on one process; on a GPU they include the pinned ``2ZOP-1G1N``.
    """
    by_name = {row.name: row for row in rows}
    changes = _changes(by_name["2ZO-1G1N"], by_name["2ZOP-1G1N"]) if "2ZOP-1G1N" in by_name else {}
    largest = max(changes, key=lambda part: abs(changes[part]), default="not measured")
    right = largest if not changes or abs(changes[largest]) >= NO_CHANGE_PERCENT else "nothing"
    missing = "a CPU has nothing to copy to, so the matrix left the pinned row out"
    said = ", ".join(f"{part} {change:+.1f} %" for part, change in changes.items())
    reason = f"Your rows say: {said}." if changes else "Which two rows of your table tell you that?"
    answers = ("speed", "memory", "nothing", "not measured")
    expected = "On a GPU expect more samples/s and the same peak on it: copies to and from pinned pages are faster."
    return Exercise(
        "What did pinning the offloaded memory of stage 2 change the most in your run? Write `speed`, `memory` (of the "
        f"GPU), `nothing` (under {NO_CHANGE_PERCENT} %) or `not measured`.",
        check=choice(right, near={answer: reason for answer in answers if answer != right}),
        hints=["Compare the rows `2ZO-1G1N` and `2ZOP-1G1N`.", "Are both in your table?"],
        solution=f"`{right}`: {said or missing}. {expected}",
    )


def _changes(before: Any, after: Any) -> dict[str, float]:
    """Return the changes in speed and in the GPU's peak memory between two rows, in percent."""
    return {
        "speed": 100 * (after.samples_per_second / before.samples_per_second - 1),
        "memory": 100 * (after.gpu.peak / before.gpu.peak - 1),
    }


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


def saving_of_the_peak(rows: Sequence[Any]) -> Exercise:
    """Return the exercise on the peak of a rank: how little of it ZeRO may save.

    Args:
        rows: rows of the reader's matrix, from stage 0 to stage 3, with ``states`` per rank and ``peak_bytes``.
    """
    peaks = [row.states[0].parameters + row.states[0].optimizer + row.peak_bytes for row in rows]
    saved = 100 * (1 - peaks[-1] / peaks[0])
    saved_states = 100 * (1 - rows[-1].states[0].total / rows[0].states[0].total)
    tolerance = 1.0
    states_alone = {saved_states: "That is the saving of the model states alone. Add the step peak to both."}
    said = ", ".join(f"{row.name} {peak / MIB:.1f} MiB" for row, peak in zip(rows, peaks, strict=True))
    return Exercise(
        f"In your run, model states are {saved_states:.0f} % smaller at stage 3 than at stage 0. By how many percent "
        "is the peak of a rank lower? At its peak a rank holds its weights and optimizer states, and on top the step "
        "peak, which has the gradients in it.",
        check=number(
            saved, tolerance=tolerance, unit="%",
            near=states_alone if abs(saved - saved_states) > 2 * tolerance else None,
        ),
        hints=[
            "The step peaks are in the table of the four stages.",
            "Weights and optimizer states of stage 3 are in the table with FSDP2, and the baseline there holds what "
            "stage 0 holds.",
        ],
        solution=f"{saved:.1f} %: {said}. The rest is mostly activations, which no stage divides. So find out what "
        "fills your GPU before you choose a stage.",
    )  # fmt: skip
