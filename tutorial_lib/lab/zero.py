"""Figures and exercises of lesson 01: a falling loss, a traced step, the choice of a stage, an incomplete resume."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutorial_lib.lab.exercises import Exercise, choice, number
from tutorial_lib.lab.figures import BLUE, ORANGE, Figure, styled_axes
from tutorial_lib.lab.timeline import Span
from tutorial_lib.theory.memory import model_states


def smooth(values: Sequence[float], window: int = 8) -> list[float]:
    """Return the running mean over up to ``window`` values."""
    return [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - window) : end])]


def loss_figure(losses: Sequence[float], evaluated: Mapping[int, float], *, title: str, alt: str) -> Figure:
    """Draw a run's losses as faint dots, their running mean as a line, and evaluations as circles.

    Args:
        losses: loss of each optimizer step, from step 1.
        evaluated: evaluation loss by optimizer step.
        title: the finding.
        alt: the figure in words.
    """
    from matplotlib.ticker import MaxNLocator

    steps = range(1, len(losses) + 1)
    with styled_axes(title, alt, size=(7.0, 3.6)) as (axes, drawn):
        axes.plot(steps, losses, "o", color=BLUE, alpha=0.45, markersize=4, label="training, each step")
        axes.plot(steps, smooth(losses), color=BLUE, linewidth=2.4, label="mean of up to 8 steps")
        axes.plot(list(evaluated), list(evaluated.values()), "o--", color=ORANGE, markersize=8, fillstyle="none",
                  markeredgewidth=1.8, linewidth=1.2, label="unseen documents")  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.figure.legend(frameon=False, ncols=3, loc="outside lower center")
    return drawn[0]


def computed_after_first_reduction(spans: Sequence[Span]) -> float:
    """Return the share of backward's computing that is still to come when a rank first sends gradients.

    Args:
        spans: the spans of one step with phases, from :func:`tutorial_lib.lab.timeline.read_trace`.
    """
    backward = [span for span in spans if span.unit == "backward"]
    first = min(span.start for span in backward if span.lane in ("all-reduce", "reduce-scatter"))
    computing = [(span.start, span.end - span.start) for span in backward if span.lane == "compute"]
    return sum(length for start, length in computing if start >= first) / sum(length for _, length in computing)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """JSON documents with headings: side by side on a page, one below the other in a terminal."""

    documents: Mapping[str, Mapping[str, Any]]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        columns = "".join(
            f'<div style="flex:1 1 15em"><b>{html.escape(heading)}</b>'
            f'<pre style="line-height:1.35;overflow-x:auto">{html.escape(text)}</pre></div>'
            for heading, text in self._texts().items()
        )
        page = f'<div style="display:flex;flex-wrap:wrap;gap:1em">{columns}</div>'
        return {"text/html": page, "text/plain": str(self)}

    def __str__(self) -> str:
        return "\n\n".join(f"{heading}\n{text}" for heading, text in self._texts().items())

    __repr__ = __str__

    def _texts(self) -> dict[str, str]:
        return {heading: json.dumps(document, indent=2) for heading, document in self.documents.items()}


def which_stage(num_params: int, num_ranks: int, gpu_gb: int, rest_gb: int) -> Exercise:
    """Ask for the lowest ZeRO stage with which a model fits, in mixed precision.

    Args:
        num_params: number of parameters of the model.
        num_ranks: number of GPUs.
        gpu_gb: memory of each, in GB (1e9 bytes).
        rest_gb: memory that activations and buffers take on each, in GB.

    Raises:
        ValueError: no stage fits, or even stage 0 does.
    """
    states = [model_states(num_params, stage, num_ranks).total / 1e9 for stage in range(4)]
    fitting = [stage for stage, held in enumerate(states) if held + rest_gb <= gpu_gb]
    if not fitting or fitting[0] == 0:
        raise ValueError(f"{states=} GB and {rest_gb=} on GPUs of {gpu_gb} GB leave nothing to choose.")
    lowest = fitting[0]
    near = {
        str(stage): f"It needs {held:.1f} + {rest_gb} GB."
        if stage < lowest
        else "It fits. So does a lower stage, which is simpler and sends no more."
        for stage, held in enumerate(states)
        if stage != lowest
    }
    return Exercise(
        f"You train a model of {num_params / 1e9:g} billion parameters in bf16 on {num_ranks} GPUs of {gpu_gb} GB. "
        f"Activations and buffers take {rest_gb} GB on each. Which is the lowest ZeRO stage that fits?",
        check=choice(str(lowest), near=near),
        hints=[
            "Each parameter has 2 bytes of weight, 2 of gradient and 12 of optimizer states. Which of them does each "
            "stage divide?",
            f"Stage 1 holds 4 bytes per parameter, and 12 divided by {num_ranks}.",
        ],
        solution=f"Stage {lowest}. The states take "
        + ", ".join(f"{held:.1f} GB at stage {stage}" for stage, held in enumerate(states))
        + f", and {gpu_gb - rest_gb} GB are free for them.",
    )


def what_was_forgotten() -> Exercise:
    """Ask which state a resume left out, judging by its losses."""
    return Exercise(
        "A resumed run repeats the undisturbed run's loss exactly at its first step. From the second step on, its "
        'losses are a little different. What did the resume forget? Answer "a", "b" or "c".\n\n'
        "a: The position in the data.\n\n"
        "b: Adam's two moments.\n\n"
        "c: The weights.",
        check=choice(
            "b",
            near={
                "a": "Then the first step would already read different rows, and its loss would differ.",
                "c": "Then the first loss would be the base model's.",
            },
        ),
        hints=["A step's loss is computed before its update. What can change the update but not the loss before it?"],
        solution="b. The first loss depends on weights and data alone. The first update also needs the moments and the "
        "learning rate, so it goes wrong, and every loss after it shows that.",
    )


def loss_of_the_step(means: Sequence[float], tokens: Sequence[int]) -> Exercise:
    """Ask for the loss of a step whose ranks hold different numbers of tokens.

    Args:
        means: each rank's mean loss per token.
        tokens: number of tokens that each rank counted.
    """
    total = sum(tokens)
    loss = sum(mean * count for mean, count in zip(means, tokens, strict=True)) / total
    ranks = ", ".join(
        f"rank {rank} counts {count} tokens with a mean loss of {mean:g}"
        for rank, (mean, count) in enumerate(zip(means, tokens, strict=True))
    )
    return Exercise(
        f"In one step, {ranks}. What is the loss of the step?",
        check=number(
            loss,
            relative=0.001,
            near={
                sum(means) / len(means): "That gives every rank the same weight. Give every token the same weight.",
                means[0]: "That is what rank 0 alone would print.",
            },
        ),
        hints=["Add up the losses of all tokens first."],
        solution="("
        + " + ".join(f"{count} x {mean:g}" for mean, count in zip(means, tokens, strict=True))
        + f") / {total} = {loss:g}",
    )
