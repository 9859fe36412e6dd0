"""Figures: reproducible, described, and readable on any page."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib import image as png

from tutorial_lib.lab import figures
from tutorial_lib.theory import memory


def every_figure() -> dict[str, figures.Figure]:
    rows = [{"step": step, "loss": 6 - step / 100, "tokens": 1000, "seconds": 0.5} for step in range(1, 21)]
    states = {
        f"stage {stage}": {
            "paper": memory.model_states(10**6, stage, 2).to_dict(),
            "estimator": {"total": 9e6},
            "measured": memory.model_states(10**6, stage, 4).to_dict(),
        }
        for stage in memory.STAGES
    }
    return {
        "curves": figures.loss_curves({"a": rows, "b": rows}, title="Both agree", alt="Two lines.", marks={"stop": 9}),
        "lines": figures.lines({"a": ([0, 0.5], [1, 2])}, title="t", alt="A line.", x_label="s", y_label="B"),
        "points": figures.lines(
            {"a": ([0, 1], [1, 2])},
            points={"seen": ([0, 1], [1, 2])},
            title="t",
            alt="A line.",
            x_label="s",
            y_label="B",
        ),
        "timeline": figures.memory_timeline(
            {"process tree": ([0, 0.5], [800 * 2**20, 900 * 2**20])},
            title="It grows",
            alt="A line.",
            marks={"step": 0.2},
        ),
        "bars": figures.bars({"a": 1, "b": 2.5}, title="b is more", alt="Bars.", unit="s"),
        "memory": figures.grouped_memory(states, title="Stages divide", alt="Stacked bars."),
        "stacked": figures.stacked_bars(
            {"a, rank 0": {"weights": 1, "rest": 2.5}, "b, rank 0": {"weights": 2}},
            title="b has no rest",
            alt="Stacked bars.",
            unit="B",
            groups=["a", "b"],
        ),
        "shards": figures.shards({"by rows": [[0, 0], [1, 1]]}, title="A rank, a row", alt="Two halves."),
    }


@pytest.fixture(scope="module")
def drawn() -> dict[str, figures.Figure]:
    return every_figure()


def test_figures_are_the_same_twice(drawn: dict[str, figures.Figure]) -> None:
    assert {name: figure.png for name, figure in drawn.items()} == {name: f.png for name, f in every_figure().items()}


def lowest_contrast(colors: np.ndarray) -> float:
    """Return the lowest contrast (as in WCAG 2) of any colour against the white background."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return float((1.05 / (luminance + 0.05)).min())


@pytest.mark.parametrize("name", ["curves", "lines", "points", "timeline", "bars"])
def test_figures_bring_their_own_background(drawn: dict[str, figures.Figure], name: str) -> None:
    """A dark page must not shine through."""
    figure = drawn[name]
    pixels = png.imread(io.BytesIO(figure.png))
    assert np.allclose(pixels.shape[:2], (2 * figure.height, 2 * figure.width), atol=1)
    assert (pixels[..., 3] == 1).all()
    assert (pixels[..., :3] == 1).all(axis=-1).mean() > 0.3, "a white background"


@pytest.mark.parametrize(("color", "lowest"), [(figures.INK, 4.5), *((color, 3.0) for color in figures.PALETTE)])
def test_ink_and_palette_contrast_with_the_background(color: str, lowest: float) -> None:
    assert lowest_contrast(np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])) >= lowest


def test_memory_over_time_is_drawn_from_zero_in_the_unit_asked_for() -> None:
    words = {"title": "It grows", "alt": "A line."}
    drawn = figures.memory_timeline({"GPU 0": ([0.0, 2.5], [2**30, 3 * 2**30])}, unit="GiB", **words)
    labels = {"x_label": "time (s)", "y_label": "memory held (GiB)"}
    assert drawn == figures.lines({"GPU 0": ([0.0, 2.5], [1, 3])}, y_start=0, **labels, **words)
    assert drawn != figures.lines({"GPU 0": ([0.0, 2.5], [1, 3])}, **labels, **words)


def test_a_figure_needs_a_title_and_a_description() -> None:
    for title, alt in (("", "alt"), ("title", " ")):
        with pytest.raises(ValueError, match="alt text"):
            figures.bars({"a": 1}, title=title, alt=alt, unit="s")


def test_a_note_is_drawn_in_the_figure() -> None:
    words = {"title": "It falls", "alt": "A line.", "x_label": "s", "y_label": "B"}
    line = {"a": ([0, 1], [2, 1])}
    assert figures.lines(line, notes={"1.5 B": (0.5, 1.6)}, **words) != figures.lines(line, **words)


def test_a_resumed_run_without_the_steps_of_a_line_is_explained():
    """A cell that starts a run again finds it complete: no step is left, and no loss returns."""
    line = {"second slot": (range(11, 21), [])}
    with pytest.raises(ValueError, match=r"'second slot' has 0 values for 10 places.* run the cell again that began"):
        figures.lines(line, title="It falls", alt="A line.", x_label="c", y_label="d")
