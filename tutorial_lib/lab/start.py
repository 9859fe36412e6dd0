"""Exercises of lesson 00: rounding or a mistake, tokens that do not count, and the three batch sizes."""

from __future__ import annotations

from tutorial_lib.lab.exercises import Exercise, choice, number


def rounding_or_mistake(apart: float) -> Exercise:
    """Return the exercise on losses that differ.

    Args:
        apart: largest difference between the losses of the reader's two runs, as a share of the loss.
    """
    return Exercise(
        f"Your two runs were at most {apart:.0e} of the loss apart. A colleague trains without dropout in fp32, too. "
        "The loss of step 1 is 4.1203 on one process and 4.1287 on two, and both fall well. Is this rounding or a "
        'mistake? Answer "rounding" or "mistake".',
        check=choice(
            "mistake",
            near={"rounding": f"That is 2e-03 of the loss. Your runs show what rounding does: {apart:.0e}."},
        ),
        hints=["How large is the difference as a share of the loss?", "Does a falling loss prove anything?"],
        solution="A mistake. The losses are 0.2 % apart, thousands of times more than rounding explains, and before "
        "the first update nothing can have drifted. For example, the processes may read different rows than one would.",
    )


def tokens_left_out(tokens: int, rows: int, row_length: int) -> Exercise:
    """Return the exercise on the tokens of a step that do not count in the loss.

    Args:
        tokens: tokens that the reader's step counted, over all ranks.
        rows: rows of a step, over all ranks.
        row_length: tokens of a row, padding included.
    """
    places = rows * row_length
    left_out = 100 * (1 - tokens / places)
    wrong = {
        100 - left_out: "That is the share that did count.",
        left_out / 100: "Answer in percent: 0.5 means half a percent.",
        places - tokens: "That is how many. Which share of all places is it?",
    }
    return Exercise(
        f"The first step of your run counted {tokens:,} tokens. It had {rows} rows with places for {row_length} tokens "
        "each. How many percent of the places did not count?",
        check=number(
            left_out,
            tolerance=0.1,
            unit="%",
            near={value: hint for value, hint in wrong.items() if abs(value - left_out) > 0.2},
        ),
        hints=["How many places are there in all?"],
        solution=f"{left_out:.1f} %: of {rows} x {row_length} = {places:,} places, {places - tokens} did not count. "
        "Nothing predicts the first token of a text, and padding is left out.",
    )


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
