"""Lesson 02: a check of its parameters, the picture of the grid, and the exercises."""

from __future__ import annotations

from typing import Any

from tutorial_lib.config import ConfigError
from tutorial_lib.lab.exercises import Exercise, Feedback, choice, number
from tutorial_lib.lab.figures import BLUE, GREEN, INK, ORANGE, PURPLE, Figure, styled_axes

SPLIT_BY_HAND = ("llama", "mistral", "qwen2")
"""Families that ``split_layer`` of ``notebooks/scripts/train_2d.py`` can split."""


def check_parameters(dp: int, tp: int, family: str, *, rows: int) -> None:
    """Refuse a grid or a model with which the lesson cannot run.

    Args:
        dp: the lesson's ``DP``.
        tp: the lesson's ``TP``.
        family: ``model_type`` of the lesson's ``MODEL``.
        rows: rows of an optimizer step.

    Raises:
        ConfigError: says what to write instead.
    """
    if tp < 2:
        raise ConfigError(f"TP = {tp} splits no layer, and this lesson is about split layers. Write TP = 2.")
    if rows % (dp * tp):
        fitting = [size for size in range(1, rows // tp + 1) if rows % (size * tp) == 0]
        instead = f"DP as one of {fitting}" if fitting else "TP = 2 and DP = 2"
        raise ConfigError(f"The lesson deals the {rows} rows of a step to DP x TP = {dp * tp} ranks. Write {instead}.")
    if family not in SPLIT_BY_HAND:
        raise ConfigError(
            f"train_2d.py, which this lesson runs, has no plan for a {family} model. Write MODEL = 'embedded/qwen2', "
            "or another Qwen2, Llama or Mistral."
        )


def draw_grid(dp: int, tp: int) -> Figure:
    """Draw the ranks of a grid: a coloured row for each tensor-parallel group, a frame for each data-parallel one."""
    from matplotlib.patches import FancyBboxPatch

    rows, columns = (BLUE, GREEN), (ORANGE, PURPLE)
    title = f"A {dp} x {tp} grid: rows share layers, columns average gradients"
    alt = f"A grid of {dp} rows, the tensor-parallel groups, and {tp} columns, the data-parallel groups, of ranks."
    step = 1.6  # from column to column
    with styled_axes(title, alt, size=(6.2, 1.5 + 0.9 * dp)) as (axes, drawn):
        axes.set_axis_off()
        axes.set(xlim=(-0.75, step * tp + 2.6), ylim=(dp + 0.1, -0.75))

        def box(x: float, y: float, width: float, height: float, **look: Any) -> None:
            axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.1", **look))

        def write(x: float, y: float, text: str, **look: Any) -> None:
            axes.text(x, y, text, **{"va": "center", "ha": "center", "fontsize": 9, **look})

        for row in range(dp):
            box(-0.65, row + 0.1, step * tp - 0.1, 0.8, facecolor=rows[row % 2], alpha=0.3, linewidth=0)
            told = f"TP group {row}: the same rows of text,\nevery layer split {tp} ways"
            write(step * tp - 0.6, row + 0.5, told, ha="left")
        for column in range(tp):
            x = step * column + 0.1
            box(x - 0.6, -0.2, 1.2, dp + 0.25, fill=False, edgecolor=columns[column % 2], linewidth=2.5)
            write(x, -0.3, f"DP group {column}: the same\nshares, different text", va="bottom")
            for row in range(dp):
                box(x - 0.45, row + 0.22, 0.9, 0.56, facecolor=INK, linewidth=0)
                write(x, row + 0.5, f"rank {row * tp + column}", color="#ffffff", fontsize=9.5, fontweight="bold")
    return drawn[0]


def global_batch(micro_batch: int, dp: int, tp: int, accumulation: int) -> Exercise:
    """Ask how many sequences a grid trains on per step."""
    return Exercise(
        f"You start {dp * tp} processes as dp = {dp} x tp = {tp}. Each forward pass takes {micro_batch} sequences, and "
        f"gradients accumulate over {accumulation} passes. How many sequences make up one optimizer step?",
        check=number(
            micro_batch * dp * accumulation,
            unit="sequences",
            near={
                micro_batch * dp * tp * accumulation: "You counted every process. Which of them read different rows?",
                micro_batch * dp: "That is one pass of all ranks. A step has several.",
            },
        ),
        hints=["How many of the ranks read different rows?", "micro-batch x dp x accumulation."],
        solution=f"{micro_batch} x {dp} x {accumulation} = {micro_batch * dp * accumulation}. The {tp} ranks of a "
        "tensor-parallel group read the same rows, so they count once.",
    )


def largest_tp(heads: int, kv_heads: int, gpus_per_node: int) -> Exercise:
    """Ask for the largest tensor-parallel size that a model and a node allow."""
    sizes = [tp for tp in range(1, gpus_per_node + 1) if gpus_per_node % tp == heads % tp == kv_heads % tp == 0]
    near: dict[float, str] = {
        gpus_per_node: "Every rank needs the same number of heads. Can you deal them out evenly?",
        max(tp for tp in range(1, gpus_per_node + 1) if heads % tp == 0): "That divides the attention heads. Does it "
        "divide the key-value heads, and the GPUs of a node?",
    }
    near.pop(max(sizes), None)
    return Exercise(
        f"A model has {heads} attention heads and {kv_heads} key-value heads. Your nodes have {gpus_per_node} GPUs, "
        "and a tensor-parallel group should stay inside one. What is the largest tp?",
        check=number(max(sizes), near=near),
        hints=["Attention is split by heads.", "tp must divide both numbers of heads, and the GPUs of a node."],
        solution=f"{max(sizes)}. It divides {heads} heads, {kv_heads} key-value heads and {gpus_per_node} GPUs; no "
        "larger number does.",
    )


def gradient_partners(rank: int, dp: int, tp: int) -> Exercise:
    """Ask for the data-parallel group of a rank."""
    partners = list(range(rank % tp, dp * tp, tp))
    row = list(range(rank // tp * tp, rank // tp * tp + tp))

    def check(answer: Any) -> Feedback:
        found = sorted(int(each) for each in answer)
        if found == partners:
            return Feedback(True)
        if found == sorted(set(partners) - {rank}):
            return Feedback(False, f"Add rank {rank} itself: it belongs to its own group.")
        if found == row:
            return Feedback(False, "Those share its layers: that is the tensor-parallel group, a row of the grid.")
        return Feedback(False, "Draw the grid: rows are filled first. The data-parallel group is a column.")

    return Exercise(
        f"dp = {dp} x tp = {tp}. Which ranks form the data-parallel group of rank {rank}? Answer with a list of ranks.",
        check=check,
        hints=["Draw the grid, rows first.", f"They all have tp rank {rank} % {tp}."],
        solution=f"{partners}: every rank with tp rank {rank % tp}. They hold the same part of every layer and average "
        "its gradients.",
    )


def what_grows() -> Exercise:
    """Ask which traffic depends on the tokens of a step."""
    return Exercise(
        "You double the sequence length and keep everything else. Whose traffic per step doubles? Answer `tensor "
        "parallel`, `ZeRO-3` or `both`.",
        check=choice(
            "tensor parallel",
            near={
                "ZeRO-3": "It sends parameters and gradients. Do those depend on how long a sequence is?",
                "both": "One of them sends parameters and gradients, which do not grow.",
            },
        ),
        hints=["What does each of them send: activations, or parameters?"],
        solution="`tensor parallel`. It sends activations, which grow with every token. ZeRO-3 sends 3Ψ elements per "
        "micro-batch, however many tokens that has.",
    )
