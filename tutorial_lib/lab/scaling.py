"""Lesson 06, scaling out: exercises that are checked against the reader's own runs, and a recording from a cluster.

Hints and solutions are kept here, so that nobody reads them before the question.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutorial_lib.lab.exercises import Exercise, choice, number

RECORDING = Path(__file__).with_name("recorded") / "cluster.json"
"""Written by ``python -m tests.cluster.record`` on SLURM; ``tests/cluster/test_recorded.py`` repeats parts of it."""


def recording() -> dict[str, Any]:
    """Return the recording, for readers without a cluster: see :data:`RECORDING`."""
    return dict(json.loads(RECORDING.read_text(encoding="utf-8")))


def table_by_nodes(recorded: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the workshop's table for several nodes.

    Args:
        recorded: measurements on 1, 2, ... nodes that share two cores, with one process each, as in the part ``nodes``
            of :func:`recording`.
    """
    alone = recorded[0]["samples_per_second"]
    return [
        {
            "nodes": row["nodes"],
            "samples/s": round(row["samples_per_second"], 1),
            "s/step": round(row["step_seconds"], 3),
            "train loss": row["train_loss"],
            "efficiency (%)": round(100 * row["samples_per_second"] / row["nodes"] / alone),
            "two cores allow (%)": round(100 * min(1, 2 / row["nodes"])),
            "node memory, peak (MiB)": row["memory_peak"] // 2**20,
            "average (MiB)": int(row["memory_mean"]) // 2**20,
            "mode (MiB)": [mode // 2**20 for mode in row["memory_modes"][:2]],
        }
        for row in recorded
    ]


def hide_paths(text: str) -> str:
    """Replace this machine's directories in a text with the directories of an imaginary cluster."""
    for here, there in {str(Path.cwd()): "/shared/run", str(Path(sys.executable).parent): "/shared/course/bin"}.items():
        text = text.replace(here, there).replace(os.path.realpath(here), there)
    return text


def strong_speed_up(num_ranks: int, samples_per_second: Mapping[int, float]) -> Exercise:
    """Return the exercise on the speed-up of strong scaling.

    Args:
        num_ranks: number of ranks of the row in question.
        samples_per_second: speeds of the reader's rows, over all ranks, by number of ranks, including 1.
    """
    one, many = samples_per_second[1], samples_per_second[num_ranks]
    expected = many / one
    return Exercise(
        f"From your strong-scaling table: how many times as fast as one process do {num_ranks} processes finish the "
        "same job?",
        check=number(
            expected,
            tolerance=0.02,
            near={expected / num_ranks: "That is the efficiency: the speed-up divided by the number of processes."},
        ),
        hints=[
            "The column train samples/s counts all processes together.",
            f"Divide the figure of {num_ranks} processes by that of one.",
        ],
        solution=f"{many:.4g} / {one:.4g} = {expected:.2f}. Below 1, the other processes cost more than they compute: "
        "then a small batch should stay on one process.",
    )


def what_stays_constant() -> Exercise:
    """Return the exercise on what weak scaling keeps constant, which the original workshop gets wrong."""
    return Exercise(
        "GPUs are added, and each keeps its batch (weak scaling). What stays constant if all goes well? Write "
        "`samples/s`, `seconds per step` or `global batch`.",
        check=choice(
            "seconds per step",
            near={
                "samples/s": "Look at your table: the figure counts all processes together.",
                "global batch": "It grows with the GPUs. That is why the learning rate may have to change.",
            },
        ),
        hints=["Each GPU does the same work as before, at the same time as the others."],
        solution="Seconds per step. Samples/s, which counts all GPUs together, grows with their number. The workshop's "
        "page expects samples/s to stay constant.",
    )


def memory_of_nodes(peaks: Sequence[int]) -> Exercise:
    """Return the exercise on the memory of virtual nodes.

    Args:
        peaks: bytes of the fullest node, from fewest to most nodes.
    """
    fell = (peaks[0] - peaks[-1]) / 2**20
    return Exercise(
        f"In the recorded table a node's peak falls by {fell:.0f} MiB from the first row to the last. ZeRO stage 2 "
        "explains less than ten MiB of that: see states/rank in your weak-scaling table. What shrank? Write "
        "`libraries`, `activations` or `gradients`.",
        check=choice(
            "libraries",
            near={
                "activations": "Each process still works on 16 rows.",
                "gradients": "All gradients together are 2.6 MiB.",
            },
        ),
        hints=[
            "These nodes are virtual: they share one machine.",
            "The sampler splits pages that several processes share among them (PSS).",
        ],
        solution="The libraries' share. All nodes map the same files of one machine, and the sampler divides such "
        "pages by the number of processes that map them. Real nodes each have a copy: there this column would hardly "
        "fall.",
    )


def break_even_tokens(flops: float, bandwidth: float) -> Exercise:
    """Return the exercise on the tokens per rank at which sending takes as long as computing.

    Args:
        flops: FLOP/s that one device reaches in training.
        bandwidth: bytes/s that each rank of an all-reduce sends.
    """
    expected = 4 / bandwidth * flops / 6
    return Exercise(
        f"An H100 that reaches {flops / 1e12:.0f} TFLOP/s computes 6 FLOPs per parameter and token. On nodes with one "
        f"GPU each, plain data parallelism in 16 bits sends 2 x 2 bytes per parameter and step, over "
        f"{bandwidth / 1e9:.0f} GB/s. With how many tokens per GPU and step do both take the same time?",
        check=number(
            expected,
            relative=0.03,
            unit="tokens",
            near={expected / 2: "An all-reduce sends every gradient twice: it is a reduce-scatter and an all-gather."},
        ),
        hints=["Write both times with the number of parameters. It cancels.", "4 / bandwidth = 6 x tokens / flops."],
        solution=f"4 x flops / (6 x bandwidth) = {expected:,.0f} tokens, whatever the model's size. With fewer, the "
        "network decides. In practice a part of the sending hides behind computing.",
    )


def who_sets_local_rank(found: Sequence[Mapping[str, str | None]]) -> Exercise:
    """Return the exercise on variables under plain ``srun``.

    Args:
        found: environment variables of each task.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if found[0][name] is None]
    return Exercise(
        "The workshop says that SLURM or torchrun provides LOCAL_RANK. SLURM does not. Which of SLURM's own variables "
        "holds that number?",
        check=choice(
            "SLURM_LOCALID",
            near={
                "LOCAL_RANK": f"Under srun alone there is none: {', '.join(missing)} are missing in the table.",
                "SLURM_PROCID": "That one counts across all nodes: it corresponds to RANK.",
            },
        ),
        hints=["Look at the table of variables: which columns start with SLURM?"],
        solution="`SLURM_LOCALID`. A script that is started by `srun` alone must translate it, and the others, or let "
        "`torchrun` do it.",
    )
