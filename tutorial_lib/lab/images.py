"""Committed pictures of the course: ``python -m tutorial_lib.lab.images [DIRECTORY]``, or ``make images``, draws them.

Pictures explain; figures (:mod:`tutorial_lib.lab.figures`) show measurements. Both share a palette and a style. Drawing
a picture twice gives the same bytes, so a test can compare the committed files with this code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutorial_lib.lab.figures import BLUE, GREEN, INK, ORANGE, PARTS, PURPLE, STYLE
from tutorial_lib.theory.memory import MIXED, model_states

DIRECTORY = Path(__file__).parents[2] / "images"
NUM_RANKS = 4
WHITE = "#ffffff"
_GHOST = 0.25
"""Opacity of things that are absent or temporary."""


def parallelism(axes: Any) -> None:
    """Draw data, sharded data and tensor parallelism: each device's memory, and the messages that it sends."""
    kinds = [
        ("Data parallel", "DDP, ZeRO stage 0", "Every device holds the\nfull model and reads\ndifferent data.",
         "gradients,\nonce per step", "2 Ψ"),
        ("Sharded data parallel", "ZeRO stage 3, FSDP",
         "Each device keeps a share\nof every layer and gathers\nthe rest to compute with it.",
         "parameters twice,\ngradients once", "3 Ψ"),
        ("Tensor parallel", "Megatron, DeepSpeed's AutoTP",
         "Each device computes with\nits share of every layer;\nall read the same data.",
         "activations, 4 times\nper layer (Megatron)", "8 b s h  per layer"),
    ]  # fmt: skip
    height, left, width, gap = 2.2, 3.3, 1.5, 0.15
    right = left + NUM_RANKS * (width + gap) + 0.15
    for rank in range(NUM_RANKS):
        _text(axes, left + rank * (width + gap) + width / 2, 0.2, f"device {rank}", ha="center")
    _text(axes, right, 0.2, "sent by each device")
    for row, (title, names, what, sent, volume) in enumerate(kinds):
        top = 0.45 + row * height
        _text(axes, 0, top + 0.25, title, size=13, weight="bold")
        _text(axes, 0, top + 0.6, names, style="italic")
        _text(axes, 0, top + 1.3, what)
        for rank in range(NUM_RANKS):
            x = left + rank * (width + gap)
            _box(axes, x, top, width, height - 0.3, INK, fill=False)
            _box(axes, x + 0.15, top + 0.15, width - 0.3, 0.36, PURPLE, f"batch {rank + 1 if row < 2 else 1}")
            for layer in range(3):
                y = top + 0.66 + layer * 0.39
                _layer(axes, x + 0.15, y, width - 0.3, rank, kept_in_full=row == 0, gathered=row == 1)
        _text(axes, right, top + 0.6, sent)
        _text(axes, right, top + 1.3, volume, size=12, weight="bold")
    bottom = 0.45 + 3 * height + 0.05
    for x, color, alpha, meaning in ((0.0, PURPLE, 1.0, "data"), (1.3, BLUE, 1.0, "parameters kept"),
                                     (3.75, BLUE, _GHOST, "gathered temporarily")):  # fmt: skip
        _box(axes, x, bottom, 0.3, 0.22, color, alpha=alpha)
        _text(axes, x + 0.42, bottom + 0.11, meaning)
    _text(axes, 7.1, bottom + 0.11, "Ψ: parameters   b s h: batch x sequence x width")
    _frame(axes, right + 2.35, bottom + 0.35)


def zero_stages(axes: Any) -> None:
    """Draw the model states on each of four ranks at ZeRO stages 0 to 3, after figure 1 of the ZeRO paper."""
    rows = [
        ("Stage 0", "plain data parallel", (), "16 Ψ"),
        ("Stage 1", "optimizer states divided", ("optimizer",), "4 Ψ + 12 Ψ/N"),
        ("Stage 2", "and gradients divided", ("optimizer", "gradients"), "2 Ψ + 14 Ψ/N"),
        ("Stage 3", "and parameters divided", tuple(PARTS), "16 Ψ/N"),
    ]
    share = {"parameters": MIXED.parameters, "gradients": MIXED.gradients, "optimizer": MIXED.optimizer}
    left, width, gap, height = 2.75, 1.25, 0.2, 1.28
    right = left + NUM_RANKS * (width + gap) + 0.1
    for rank in range(NUM_RANKS):
        _text(axes, left + rank * (width + gap) + width / 2, 0.32, f"rank {rank}", ha="center")
    _text(axes, right, 0.32, "bytes per rank")
    _text(axes, right + 2.1, 0.22, "Ψ = 7 billion,\nN = 4")
    for row, (stage, what, divided, formula) in enumerate(rows):
        top = 0.6 + row * (height + 0.22)
        _text(axes, 0, top + height / 2 - 0.18, stage, size=13, weight="bold")
        _text(axes, 0, top + height / 2 + 0.18, what)
        for rank in range(NUM_RANKS):
            x, y = left + rank * (width + gap), top
            for part, color in PARTS.items():
                depth = height * share[part] / MIXED.total
                if part in divided:
                    _box(axes, x, y, width, depth, color, alpha=_GHOST, rounded=False)
                    _box(axes, x + rank * width / NUM_RANKS, y, width / NUM_RANKS, depth, color, rounded=False)
                else:
                    _box(axes, x, y, width, depth, color, rounded=False)
                y += depth
        gigabytes = model_states(7_000_000_000, row, NUM_RANKS).total / 1e9
        _text(axes, right, top + height / 2, formula, size=11)
        _text(axes, right + 2.1, top + height / 2, f"{gigabytes:.4g} GB" if row == 0 else f"{gigabytes:.1f} GB",
              size=13, weight="bold")  # fmt: skip
    bottom = 0.6 + 4 * (height + 0.22) + 0.05
    meanings = [("parameters", "parameters: 2 bytes"), ("gradients", "gradients: 2 bytes"),
                ("optimizer", "optimizer states: 12 bytes")]  # fmt: skip
    for x, (part, meaning) in zip((0.0, 2.75, 5.4), meanings, strict=True):
        _box(axes, x, bottom, 0.3, 0.22, PARTS[part], rounded=False)
        _text(axes, x + 0.42, bottom + 0.11, meaning)
    _text(axes, right, bottom + 0.11, "Ψ: parameters    N: ranks")
    _frame(axes, right + 3.75, bottom + 0.35)


def tensor_parallel(axes: Any) -> None:
    """Draw a column-parallel and a row-parallel product on two ranks, and the two all-reduces that they cost."""
    colors, side, top, gap = (BLUE, GREEN), 1.6, 0.75, 1.1
    places = {"x": 1.5, "A": 4.0, "Y": 6.5, "B": 10.1, "Z": 12.6}
    captions = {
        "x": "input\nthe same on both", "A": "column-parallel\nsplit by outputs", "Y": "activation\nsplit, not sent",
        "B": "row-parallel\nsplit by inputs", "Z": "partial sums",
    }  # fmt: skip
    signs = {"A": "\N{MULTIPLICATION SIGN}", "Y": "=", "B": "\N{MULTIPLICATION SIGN}", "Z": "="}
    for name, x in places.items():
        _text(axes, x + side / 2, 0.3, captions[name], ha="center")
    for rank, color in enumerate(colors):
        y = top + rank * (side + gap)
        _text(axes, 0, y + side / 2, f"rank {rank}", size=13, weight="bold")
        for name, x in places.items():
            _matrix(axes, x, y, side, name, rank, color)
        for name, sign in signs.items():
            _text(axes, places[name] - 0.45, y + side / 2, sign, size=16, ha="center")
        _arrow(axes, places["Y"] + side + 0.1, y + side / 2, places["B"] - 0.8, y + side / 2)
        _text(axes, places["Y"] + side + 0.6, y + side / 2 - 0.3, "GELU", ha="center")
    middle = top + side + gap / 2
    for name, label, shift, align in (
        ("x", "backward:\nall-reduce of\nx's gradient", -0.25, "right"),
        ("Z", "forward:\nall-reduce,\nZ = Z₀ + Z₁", 0.25, "left"),
    ):
        x = places[name] + side / 2
        _arrow(axes, x, top + side + 0.1, x, top + side + gap - 0.1, both_ways=True)
        _text(axes, x + shift, middle, label, ha=align, weight="bold")
    bottom = top + 2 * side + gap + 0.3
    _text(axes, 0, bottom, "Filled: what a rank holds or computes. Double arrows: what the ranks exchange.")
    _frame(axes, places["Z"] + side + 1.0, bottom + 0.3)


def _matrix(axes: Any, x: float, y: float, side: float, name: str, rank: int, color: str) -> None:
    """Draw one matrix of :func:`tensor_parallel`: in full, half of its columns, or half of its rows."""
    half, label = side / 2, name if name == "x" else name + "₀₁"[rank]
    if name in "xZ":
        _box(axes, x, y, side, side, PURPLE if name == "x" else color, label, size=14, rounded=False)
        return
    _box(axes, x, y, side, side, INK, fill=False, rounded=False)
    if name == "B":
        _box(axes, x, y + rank * half, side, half, color, label, size=14, rounded=False)
    else:
        _box(axes, x + rank * half, y, half, side, color, label, size=14, rounded=False)


def fsdp_strategies(axes: Any) -> None:
    """Draw the parameters on rank 0 of four during a step, under each FSDP strategy."""
    passes = [f"layer {layer}\nforward" for layer in (1, 2, 3)] + [f"layer {layer}\nbackward" for layer in (3, 2, 1)]
    phases = ["before", *passes, "update"]
    none, one, all_layers = (), ((0,), (1,), (2,)), (0, 1, 2)
    strategies = [
        ("full_shard", "ZeRO stage 3", 4, (none, *one, *one[::-1], none),
         "all-gather twice,\nreduce-scatter", "3 Ψ"),
        ("shard_grad_op", "gathered once", 4, (none, (0,), (0, 1), all_layers, all_layers, (0, 1), (0,), none),
         "all-gather once,\nreduce-scatter", "2 Ψ"),
        ("hybrid_shard", "a copy on every\n2 ranks", 2, (none, *one, *one[::-1], none),
         "as full_shard; all-reduce\nbetween copies", "3 Ψ + 2 Ψ/2 = 4 Ψ"),
        ("no_shard", "DDP", 1, (none,) * len(phases), "all-reduce", "2 Ψ"),
    ]  # fmt: skip
    left, width, gap, height, top = 2.75, 0.97, 0.12, 1.3, 0.75
    right = left + len(phases) * (width + gap) + 0.1
    for place, phase in enumerate(phases):
        _text(axes, left + place * (width + gap) + width / 2, 0.3, phase, ha="center", size=9)
    _text(axes, right, 0.3, "elements sent per step")
    for row, (name, alias, shards, gathered, sent, volume) in enumerate(strategies):
        y = top + row * height
        _text(axes, 0, y + 0.3, name, size=13, weight="bold")
        _text(axes, 0, y + 0.55, alias, va="top")
        for place, layers in enumerate(gathered):
            x = left + place * (width + gap)
            _box(axes, x, y, width, height - 0.25, INK, fill=False)
            for layer in range(3):
                at = y + 0.12 + layer * 0.29
                if layer in layers:
                    _box(axes, x + 0.1, at, width - 0.2, 0.22, BLUE, alpha=_GHOST, rounded=False)
                _box(axes, x + 0.1, at, (width - 0.2) / shards, 0.22, BLUE, rounded=False)
        _text(axes, right, y + 0.3, sent)
        _text(axes, right, y + 0.8, volume, size=12, weight="bold")
    bottom = top + len(strategies) * height + 0.05
    for x, alpha, meaning in ((0.0, 1.0, "kept by rank 0 of 4"), (2.75, _GHOST, "gathered temporarily")):
        _box(axes, x, bottom, 0.3, 0.22, BLUE, alpha=alpha, rounded=False)
        _text(axes, x + 0.42, bottom + 0.11, meaning)
    _text(axes, 6.2, bottom + 0.11, "In each box: the parameters of layers 1, 2 and 3, Ψ in all.")
    _text(axes, 6.2, bottom + 0.47, "Gradients and moments are not drawn.")
    _frame(axes, right + 2.85, bottom + 0.7)


def checkpoint(axes: Any) -> None:
    """Draw the phases of a save until it becomes visible, and the files that a kill leaves behind in each."""
    partial, complete = ".partial-step-8/", (1.0,) * NUM_RANKS
    phases = [
        ("1  write", "Every rank writes its\nown shard, in parallel.", BLUE, partial, (0.55, 0.8, 0.35, 0.65)),
        ("2  sync and hash", "Each file reaches the disk;\nits SHA-256 is taken.", BLUE, partial, complete),
        ("3  manifest", "Rank 0 lists all files,\nwith size and hash.", ORANGE, partial, complete),
        ("4  rename", "One operation of the\nfile system.", GREEN, "step-8/", complete),
    ]  # fmt: skip
    width, gap, height = 2.85, 0.55, 2.6
    for index, (title, what, color, name, written) in enumerate(phases):
        x = index * (width + gap)
        _box(axes, x, 0, width, 0.5, color, title, size=13)
        _text(axes, x, 0.92, what)
        _box(axes, x, 1.4, width, height, INK if index < 3 else GREEN, fill=False)
        _text(axes, x + 0.15, 1.65, name, family="DejaVu Sans Mono", weight="bold" if index == 3 else "normal")
        for rank, share in enumerate(written):
            y = 1.95 + rank * 0.38
            _box(axes, x + 0.15, y, width - 0.3, 0.28, BLUE, alpha=_GHOST, rounded=False)
            label = f"rank {rank}" if share == 1.0 else ""
            _box(axes, x + 0.15, y, (width - 0.3) * share, 0.28, BLUE, label, size=9, rounded=False)
        if index >= 2:
            _box(axes, x + 0.15, 1.95 + 4 * 0.38, width - 0.3, 0.34, ORANGE, "manifest.json", size=9, rounded=False)
        if index < len(phases) - 1:
            _arrow(axes, x + width + 0.06, 1.4 + height / 2, x + width + gap - 0.06, 1.4 + height / 2)
    bottom, total = 1.4 + height + 0.2, 4 * width + 3 * gap
    unlisted, last = 2 * width + gap, 3 * (width + gap)
    _box(axes, 0, bottom, unlisted, 0.62, INK, "killed here: resumes from step-4", size=11)
    _box(axes, unlisted + gap, bottom, width, 0.62, ORANGE, "killed here:\nnext start renames it", size=9)
    _box(axes, last, bottom, width, 0.62, GREEN, "here: from step-8", size=11)
    _frame(axes, total + 0.1, bottom + 0.72)


def launchers(axes: Any) -> None:
    """Draw the processes of a job on two nodes with two GPUs each: who starts them, and who numbers them."""
    node_width, gap, left = 4.6, 0.5, 3.3
    right = left + 2 * node_width + gap
    stages = [
        (0.0, "sbatch", "queues the script"),
        (1.35, "srun", "starts one task per node"),
        (2.7, "torchrun", "starts one process per GPU"),
        (4.05, "your script", "one process for each GPU"),
    ]
    for y, name, what in stages:
        _text(axes, 0, y + 0.25, name, size=13, weight="bold")
        _text(axes, 0, y + 0.62, what)
    for node in range(2):
        _box(axes, left + node * (node_width + gap), 2.2, node_width, 2.95, INK, fill=False)
        _text(axes, left + node * (node_width + gap) + 0.15, 2.42, f"node{node + 1}", weight="bold")
    middle = (left + right) / 2
    _box(axes, middle - 2.2, 0, 4.4, 0.75, ORANGE, "batch script, on the first node")
    _box(axes, middle - 2.2, 1.15, 4.4, 0.75, ORANGE, "srun")
    _arrow(axes, middle, 0.77, middle, 1.12)
    for node in range(2):
        x = left + node * (node_width + gap)
        _box(axes, x + 1.0, 2.7, node_width - 1.2, 0.75, BLUE, "torchrun", size=11)
        _arrow(axes, middle, 1.92, x + node_width / 2 + 0.4, 2.67)
        for local in range(2):
            at = x + 0.2 + local * (node_width / 2 - 0.05)
            _box(axes, at, 4.0, node_width / 2 - 0.35, 0.95, GREEN, f"RANK={2 * node + local}\nLOCAL_RANK={local}")
            _arrow(axes, x + node_width / 2 + 0.4, 3.47, at + 0.9, 3.97)
    bottom = 5.4
    for x, color, meaning in ((0.0, ORANGE, "SLURM"), (1.35, BLUE, "one per node"), (3.4, GREEN, "one per GPU")):
        _box(axes, x, bottom, 0.3, 0.22, color, rounded=False)
        _text(axes, x + 0.42, bottom + 0.11, meaning)
    _text(axes, 5.4, bottom + 0.11, "All four see WORLD_SIZE=4, LOCAL_WORLD_SIZE=2, MASTER_ADDR=node1", size=9)
    _frame(axes, right + 0.1, bottom + 0.35)


def ray_train(axes: Any) -> None:
    """Draw what the driver, controller, workers and storage exchange when Ray Train runs a loop."""
    height, workers, storage = 0.95, 8.3, 12.6
    _box(axes, 0, 1.0, 2.6, height, PURPLE, "your notebook\ntrainer.fit()", size=11)
    _box(axes, 4.4, 1.0, 2.2, height, ORANGE, "Ray Train's\ncontroller", size=11)
    _arrow(axes, 2.7, 1.3, 4.3, 1.3)
    _text(axes, 3.5, 0.7, "function,\nsettings", ha="center", size=9)
    _arrow(axes, 4.3, 1.65, 2.7, 1.65)
    _text(axes, 3.5, 1.95, "Result", ha="center", size=9)
    for rank, y in enumerate((0.2, 1.8)):
        _box(axes, workers, y, 2.3, height, BLUE, f"worker, rank {rank}\ntrain_loop(...)", size=11)
        _arrow(axes, 6.7, 1.35, workers - 0.1, y + 0.35)
        _arrow(axes, workers + 2.4, y + height / 2, storage - 0.1, y + height / 2)
        _box(axes, storage + 0.15, y, 2.4, height, BLUE, f"shard of rank {rank}", size=10, rounded=False)
    _text(axes, 7.4, 0.25, "starts", ha="center", size=9)
    _arrow(axes, workers - 0.1, 2.55, 6.7, 1.75)
    _text(axes, 7.1, 2.5, "report", ha="center", size=9)
    _arrow(axes, workers + 1.15, 1.18, workers + 1.15, 1.77, both_ways=True)
    _text(axes, workers + 1.3, 1.47, "gloo or NCCL", size=9)
    _text(axes, 11.6, 0.3, "writes", ha="center", size=9)
    _box(axes, storage, 0, 2.7, 3.0, INK, fill=False)
    _text(axes, storage, 3.25, "shared storage")
    caption = "Model data goes between workers and to the storage, never through the notebook or the controller."
    _text(axes, 0, 3.25, caption)
    _frame(axes, storage + 2.8, 3.45)


PICTURES: dict[str, Callable[[Any], None]] = {
    "parallelism": parallelism,
    "zero-stages": zero_stages,
    "tensor-parallel": tensor_parallel,
    "fsdp-strategies": fsdp_strategies,
    "checkpoint": checkpoint,
    "launchers": launchers,
    "ray-train": ray_train,
}
"""Pictures by the name of their file."""


def draw(name: str, directory: Path = DIRECTORY) -> Path:
    """Draw one picture as ``directory/name.svg``, with the same bytes every time, and return its path."""
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    path = directory / f"{name}.svg"
    directory.mkdir(parents=True, exist_ok=True)
    with style.context(["default", STYLE]):
        canvas = Canvas(figsize=(9, 5))
        axes = canvas.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        PICTURES[name](axes)
        canvas.set_size_inches(9, 9 * axes.get_ylim()[0] / axes.get_xlim()[1])
        canvas.savefig(path, metadata={"Date": None, "Creator": None})
    # The writer leaves spaces at the end of some lines, which version control would complain about.
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tutorial_lib.lab.images", description="Draw the course's pictures."
    )
    parser.add_argument("directory", type=Path, nargs="?", default=DIRECTORY, help="destination (default: images/)")
    directory = parser.parse_args().directory
    for name in PICTURES:
        print(draw(name, directory))


def _layer(axes: Any, x: float, y: float, width: float, rank: int, *, kept_in_full: bool, gathered: bool) -> None:
    if kept_in_full:
        _box(axes, x, y, width, 0.28, BLUE, rounded=False)
        return
    if gathered:
        _box(axes, x, y, width, 0.28, BLUE, alpha=_GHOST, rounded=False)
    _box(axes, x + rank * width / NUM_RANKS, y, width / NUM_RANKS, 0.28, BLUE, rounded=False)


def _box(axes: Any, x: float, y: float, width: float, height: float, color: str, text: str = "", *, size: int = 10,
         alpha: float = 1.0, fill: bool = True, rounded: bool = True) -> None:  # fmt: skip
    from matplotlib.patches import FancyBboxPatch, Rectangle

    look: dict[str, Any] = (
        {"facecolor": color, "linewidth": 0, "alpha": alpha} if fill else {"fill": False, "edgecolor": color}
    )
    if rounded:
        style = "round,pad=0,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, **look))
    else:
        axes.add_patch(Rectangle((x, y), width, height, **look))
    if text:
        axes.text(x + width / 2, y + height / 2, text, color=WHITE, size=size, weight="bold", ha="center",
                  va="center_baseline")  # fmt: skip


def _text(axes: Any, x: float, y: float, text: str, **look: Any) -> None:
    axes.text(x, y, text, **{"va": "center", "ha": "left", "linespacing": 1.35, "size": 10, **look})


def _arrow(axes: Any, x: float, y: float, to_x: float, to_y: float, *, both_ways: bool = False) -> None:
    look = {"arrowstyle": "<|-|>" if both_ways else "-|>", "color": INK, "linewidth": 2}
    axes.annotate("", (to_x, to_y), (x, y), arrowprops=look)


def _frame(axes: Any, width: float, height: float) -> None:
    """Show the area from (0, 0), top left, to (width, height), with a small margin."""
    axes.set_xlim(-0.1, width)
    axes.set_ylim(height, -0.1)


if __name__ == "__main__":
    main()
